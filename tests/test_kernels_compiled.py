"""Every Triton twin compiles for GPUs that are not here, and keeps within their means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, compile_case
from workbench_kernels.fused.cases import all_cases
from workbench_kernels.tier import FUSED_OPS

CASES = {kind: all_cases(kind) for kind in ("bf16", "fp32")}
# Of these ops, the constant by which the many tiles are ordered.
SIZES = {"moe_mlp": "BLOCK_X", "moe_route": "BLOCK_E", "rms_norm": "BLOCK_D", "rope": "BLOCK_P"}
# One architecture of each vendor: with all four, the tests would take twice as long.
EVERY_TILE = ("sm_90", "gfx942")


def compilations(op: str, architecture: str) -> list[tuple[str, Case]]:
    """What the op chooses there, in bfloat16 and on some in float32: of many tiles all, or the narrowest and widest."""
    found = []
    for kind in ("bf16", "fp32") if architecture in EVERY_TILE else ("bf16",):
        sizes = [case.constants.get(SIZES.get(op, "")) for case in CASES[kind][op]]
        known = {size for size in sizes if size is not None}
        kept = {None, *known} if architecture in EVERY_TILE or not known else {None, min(known), max(known)}
        found += [
            (kind, case)
            for case, size in zip(CASES[kind][op], sizes, strict=True)
            if architecture in case.architectures and size in kept
        ]
    return found


PAIRS = [
    pytest.param(case, architecture, id=f"{case.name} {kind} {architecture}")
    for op in CASES["bf16"]
    for architecture in SHARED_LIMIT
    for kind, case in compilations(op, architecture)
]


def test_every_twin_is_listed() -> None:
    assert set(CASES["bf16"]) == FUSED_OPS


@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_compiles_within_its_means(case: Case, architecture: str) -> None:
    assert compile_case(case, architecture).faults(case, architecture) == []


def test_the_table_is_that_of_the_kernels() -> None:
    """`python kernels/bench/compile.py` writes it; the numbers are those of the Triton that it names."""
    table = (Path(__file__).parents[1] / "kernels" / "bench" / "compiled.md").read_text(encoding="utf-8")
    rows = [tuple(x.strip() for x in line.split("|")[1:4]) for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [(case.name, case.tile, str(case.num_warps)) for cases in CASES["bf16"].values() for case in cases]
    assert "**" not in table


def test_the_gate_sees_a_spill() -> None:
    """The widest forward tile in one warp cannot fit the registers."""
    widest = next(x for x in reversed(CASES["bf16"]["rms_norm"]) if x.kernel.__name__ == "rms_norm_fwd_kernel")
    narrow = replace(widest, num_warps=1)
    assert "spills" in str(compile_case(narrow, "sm_90").faults(narrow, "sm_90"))


def test_the_gate_sees_products_made_by_hand() -> None:
    case = replace(CASES["bf16"]["rope"][0], matrix="wide")
    assert compile_case(case, "sm_90").faults(case, "sm_90") == ["no wgmma.mma_async"]
