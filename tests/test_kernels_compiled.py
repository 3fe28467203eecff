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
# Of these ops, the constant by which the many tiles are ordered.
SIZES = {"rms_norm": "BLOCK_D", "rope": "BLOCK_P"}
# One architecture of each vendor: with all four, the tests would take twice as long.
EVERY_TILE = ("sm_90", "gfx942")


def compiled_for(op: str, architecture: str) -> list[Case]:
    """What the op chooses there, in bfloat16 and float32: of many tiles by width all, or the narrowest and widest."""
    found = []
    for kind in ("bf16", "fp32"):
        cases = [replace(case, name=f"{case.name} {kind}") for case in all_cases(kind)[op]]
        if op in SIZES and architecture not in EVERY_TILE:
            widths = [case.constants[SIZES[op]] for case in cases]
            cases = [case for case, x in zip(cases, widths, strict=True) if x in (min(widths), max(widths))]
        found += [case for case in cases if architecture in case.architectures]
    return found


PAIRS = [
    pytest.param(case, architecture, id=f"{case.name} {architecture}")
    for op in CASES
    for architecture in SHARED_LIMIT
    for case in compiled_for(op, architecture)
]


def test_every_twin_is_listed() -> None:
    assert set(CASES) == FUSED_OPS


@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_compiles_within_its_means(case: Case, architecture: str) -> None:
    assert compile_case(case, architecture).faults(case, architecture) == []


def test_the_table_is_that_of_the_kernels() -> None:
    """`python kernels/bench/compile.py` writes it; the numbers are those of the Triton that it names."""
    table = (Path(__file__).parents[1] / "kernels" / "bench" / "compiled.md").read_text(encoding="utf-8")
    rows = [tuple(x.strip() for x in line.split("|")[1:4]) for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [(case.name, case.tile, str(case.num_warps)) for cases in CASES.values() for case in cases]
    assert "**" not in table


def test_the_gate_sees_a_spill() -> None:
    """The widest forward tile in one warp cannot fit the registers."""
    widest = next(x for x in reversed(CASES["rms_norm"]) if x.kernel.__name__ == "rms_norm_fwd_kernel")
    narrow = replace(widest, num_warps=1)
    assert "spills" in str(compile_case(narrow, "sm_90").faults(narrow, "sm_90"))


def test_the_gate_sees_products_made_by_hand() -> None:
    case = replace(CASES["rope"][0], matrix="wide")
    assert compile_case(case, "sm_90").faults(case, "sm_90") == ["no wgmma.mma_async"]
