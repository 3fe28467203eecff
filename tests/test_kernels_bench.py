"""The benchmark's figure: what it draws is what was measured, and nothing stands above its roof."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "kernels" / "bench"


def test_a_short_run_checks_measures_and_draws(tmp_path: Path) -> None:
    target = tmp_path / "roofline"
    command = [sys.executable, BENCH / "run.py", "--device", "cpu", "--op", "rms_norm", "--op", "grouped_mm"]
    ran = subprocess.run(
        [*command, "--rounds", "2", "--plot", target], capture_output=True, text=True, timeout=300, check=True
    )
    *lines, html, png = ran.stdout.splitlines()
    measured = [json.loads(line) for line in lines]
    assert {line["op"] for line in measured if "op" in line} == {"rms_norm", "grouped_mm"}
    assert {line["ceiling"] for line in measured if "matmul_tflops" in line} == {"float32", "bfloat16"}
    assert all(line["p20_ms"] <= line["median_ms"] <= line["p80_ms"] for line in measured if "median_ms" in line)
    page = Path(html).read_text(encoding="utf-8")
    assert "F.grouped_mm" in page and "roof, bfloat16" in page
    assert Path(png).read_bytes().startswith(b"\x89PNG")


def test_a_roof_is_the_lower_of_memory_and_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from plot import roof

    ceiling = {"matmul_tflops": 100.0, "copy_gb_per_s": 1000.0}
    assert [roof(ceiling, intensity) for intensity in (10.0, 100.0, 1000.0)] == [10.0, 100.0, 100.0]
