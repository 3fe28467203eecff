"""Every Triton twin compiles for GPUs that are not here, and keeps within their means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, compile_case
from workbench_kernels.fused.cases import all_cases
from workbench_kernels.tier import FUSED_OPS

CASES = all_cases()
# The constant by which the tiles of an op are ordered.
SIZES = {"rms_norm": "BLOCK_D", "rope": "BLOCK_P"}


# One architecture of each vendor: with all four, the tests would take twice as long.
EVERY_TILE = ("sm_90", "gfx942")


def compiled_for(op: str, architecture: str) -> list[Case]:
    """Tiles in bfloat16 and float32, with and without a masked edge: all, or else the narrowest and the widest."""
    cases, size = CASES[op], SIZES[op]
    widths = {case.constants[size] for case in cases}
    kept = widths if architecture in EVERY_TILE else {min(widths), max(widths)}
    narrow = [case for case in cases if case.constants[size] in kept]
    return [*narrow, *(case.retyped("fp32") for case in narrow)]


PAIRS = [
    pytest.param(case, architecture, id=f"{case.name} {architecture}")
    for op in CASES
    for architecture in SHARED_LIMIT
    for case in compiled_for(op, architecture)
]


def test_every_twin_is_listed() -> None:
    assert set(CASES) == FUSED_OPS


@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_compiles_without_spills(case: Case, architecture: str) -> None:
    usage = compile_case(case, architecture)
    assert usage.spills == 0
    assert usage.shared_bytes <= SHARED_LIMIT[architecture]


def test_the_table_is_that_of_the_kernels() -> None:
    """`python kernels/bench/compile.py` writes it; the numbers are those of the Triton that it names."""
    table = (Path(__file__).parents[1] / "kernels" / "bench" / "compiled.md").read_text(encoding="utf-8")
    rows = [tuple(x.strip() for x in line.split("|")[1:4]) for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [(case.name, case.tile, str(case.num_warps)) for cases in CASES.values() for case in cases]
    assert "**" not in table


def test_the_gate_sees_a_spill() -> None:
    """The widest forward tile in one warp cannot fit the registers."""
    widest = next(x for x in reversed(CASES["rms_norm"]) if x.kernel.__name__ == "rms_norm_fwd_kernel")
    assert compile_case(replace(widest, num_warps=1), "sm_90").spills > 0
