"""Measured launch parameters: where they come from, who wins, what a damaged file says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from workbench_kernels.fused import linear_cross_entropy, rope
from workbench_kernels.fused.cases import all_cases
from workbench_kernels.fused.grouped_mm import Launch, launch_for
from workbench_kernels.fused.tuned import FOLDER, Tuned

BENCH = Path(__file__).parents[1] / "kernels" / "bench"
PICKED = launch_for(512, 1024, 1024, 2, "sm_90")
FASTER = Launch(128, 128, 64, 8, 4)


def test_a_measured_launch_takes_the_place_of_the_picked_one(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "some_gpu.json"
    table = Tuned(path)
    assert table.choose("kernel rows=1", PICKED) == PICKED
    table.set("kernel rows=1", FASTER)
    table.save()
    again = Tuned(path)
    assert again.choose("kernel rows=1", PICKED) == FASTER
    assert again.choose("kernel rows=2", PICKED) == PICKED
    assert again.asked == {"kernel rows=1": PICKED, "kernel rows=2": PICKED}


def test_a_launch_of_another_kernel_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"kernel": {"block_q": 3}}))
    with pytest.raises(ValueError, match=r"gpu.json: 'kernel' is no Launch: .*block_q"):
        Tuned(path).choose("kernel", PICKED)


def test_what_is_shipped_names_kernels_that_there_are() -> None:
    kernels = {case.kernel.__name__ for cases in all_cases().values() for case in cases}
    assert "grouped_mm_fwd_kernel" in kernels
    for path in FOLDER.glob("*.json"):
        assert {key.split()[0] for key in Tuned(path).launches} <= kernels


def test_neighbours_leave_what_must_cover_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from tune import neighbours

    assert {launch.block_p for launch in neighbours(rope.launch_for(64))} == {rope.launch_for(64).block_p}
    assert {launch.block_v for launch in neighbours(linear_cross_entropy.launch_for(50_257))} == {2048, 4096, 8192}
    assert {launch.block_m for launch in neighbours(PICKED)} == {64, 128, 256}


def test_tuning_walks_to_the_fastest_and_leaves_out_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from tune import improve

    table = Tuned(tmp_path / "gpu.json")
    table.choose("kernel", PICKED)
    tried = []

    def milliseconds() -> float | None:
        launch = table.choose("kernel", PICKED)
        tried.append(launch)
        if launch.num_stages == 5:
            return None  # does not fit
        return 10 - launch.num_stages + launch.block_n / 32

    before, after = improve(table, "kernel", milliseconds)
    best = table.choose("kernel", PICKED)
    assert (best.num_stages, best.block_n) == (4, 8) and after < before
    assert any(launch.num_stages == 5 for launch in tried)
    assert asdict(best) == table.launches["kernel"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_tuning_says_in_one_line_that_it_needs_a_gpu() -> None:
    ran = subprocess.run([sys.executable, BENCH / "tune.py"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and ran.stderr.strip() == "tuning needs a GPU: torch sees no CUDA or ROCm device"
