"""The benchmark's figure: what it draws is what was measured, and nothing stands above its roof."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

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


def test_a_peer_that_fails_is_told_of_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from cases import rms_norm_cases
    from run import Clock, measure

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this shape")

    case = next(rms_norm_cases(torch.float32, "cpu"))
    case = replace(case, peers={**case.peers, "a peer": broken})
    failed, *lines = measure(case, Clock("cpu"), {"copy": 1.0}, rounds=2)
    assert failed == {"op": "rms_norm", "shape": case.shape, "candidate": "a peer", "failed": "RuntimeError: no kernel"}
    assert {line["candidate"] for line in lines} == {"workbench_kernels", "definition", "F.rms_norm"}
    with pytest.raises(RuntimeError, match="no kernel"):
        list(measure(replace(case, ours=broken), Clock("cpu"), {"copy": 1.0}, rounds=2))


def test_what_is_wrong_is_told_of_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import run
    from cases import CASES, rms_norm_cases

    def with_a_wrong_one(dtype: torch.dtype, device: str):
        right = next(rms_norm_cases(dtype, device))
        return [replace(right, ours=lambda x, weight: right.ours(x, weight) * 1.1), right]

    monkeypatch.setitem(CASES, "rms_norm", with_a_wrong_one)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--op", "rms_norm", "--rounds", "2"])
    with pytest.raises(SystemExit, match="wrong above was not timed"):
        run.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["exceeds" in line["wrong"] for line in lines if "wrong" in line] == [True, True]
    assert {line["dtype"] for line in lines if "median_ms" in line} == {"float32", "bfloat16"}
