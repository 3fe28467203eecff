"""Every Triton twin compiles for GPUs that are not here, and keeps within their means."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from workbench_kernels.fused import rms_norm
from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, compile_case
from workbench_kernels.tier import FUSED_OPS

CASES = {"rms_norm": rms_norm.cases()}


def narrowest_middle_and_widest(cases: list[Case]) -> list[Case]:
    """Three tiles of each kernel, each with and without a masked edge."""
    blocks = sorted({case.constants["BLOCK_D"] for case in cases})
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    return [case for case in cases if case.constants["BLOCK_D"] in chosen]


def test_every_twin_is_listed() -> None:
    assert set(CASES) == FUSED_OPS


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("case", narrowest_middle_and_widest(CASES["rms_norm"]), ids=lambda case: case.name)
def test_rms_norm_compiles_without_spills(case: Case, architecture: str) -> None:
    usage = compile_case(case, architecture)
    assert usage.spills == 0
    assert usage.shared_bytes <= SHARED_LIMIT[architecture]


def test_the_gate_sees_a_spill() -> None:
    """The widest forward tile in one warp cannot fit the registers."""
    widest = rms_norm.cases()[-2]
    assert compile_case(replace(widest, num_warps=1), "sm_90").spills > 0
