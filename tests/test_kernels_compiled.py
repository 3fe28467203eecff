"""Every Triton twin compiles for GPUs that are not here, and keeps within their means."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from ahead_of_time_pool import Compilation, cases_of, compiling

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, compile_case
from workbench_kernels.tier import FUSED_OPS

CASES = {kind: cases_of(kind) for kind in ("bf16", "fp32")}
# Of these ops, the constant by which the many tiles are ordered.
SIZES = {
    "mla_attention": "BLOCK_K",
    "mla_decode": "BLOCK_C",
    "moe_mlp": "BLOCK_X",
    "moe_route": "BLOCK_E",
    "rms_norm": "BLOCK_D",
    "rope": "BLOCK_P",
}
# One architecture of each vendor: with all four, the tests would take twice as long.
EVERY_TILE = ("sm_90", "gfx942")


def compilations(op: str, architecture: str) -> list[Compilation]:
    """What the op chooses there, in bfloat16 and on some in float32: of many tiles all, or the narrowest and widest."""
    found = []
    for kind in ("bf16", "fp32") if architecture in EVERY_TILE else ("bf16",):
        sizes = [case.constants.get(SIZES.get(op, "")) for case in CASES[kind][op]]
        known = {size for size in sizes if size is not None}
        kept = {None, *known} if architecture in EVERY_TILE or not known else {None, min(known), max(known)}
        found += [
            Compilation(kind, op, index, architecture)
            for index, (case, size) in enumerate(zip(CASES[kind][op], sizes, strict=True))
            if architecture in case.architectures and size in kept
        ]
    return found


ALL = [found for op in CASES["bf16"] for architecture in SHARED_LIMIT for found in compilations(op, architecture)]


@pytest.fixture(scope="module")
def faults_of(request: pytest.FixtureRequest) -> Iterator[dict[Compilation, Future[list[str]]]]:
    """Those of the compilations that this session tests."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [spec.params.get("compilation") for spec in specs if spec is not None]
    with compiling([compilation for compilation in chosen if isinstance(compilation, Compilation)]) as found:
        yield found


def test_every_twin_is_listed() -> None:
    assert set(CASES["bf16"]) == FUSED_OPS


@pytest.mark.parametrize("compilation", ALL, ids=lambda x: f"{x.case.name} {x.kind} {x.architecture}")
def test_compiles_within_its_means(compilation: Compilation, faults_of: dict[Compilation, Future[list[str]]]) -> None:
    assert faults_of[compilation].result() == []


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


def test_the_gate_sees_products_that_wait_for_each_other() -> None:
    """A narrow tile with sums of its rows beside the products."""
    gathered = next(
        x for x in CASES["bf16"]["grouped_mm"] if "weight_kernel gathered sm_90" in x.name and x.matrix == "wide"
    )
    narrow = replace(gathered, constants={**gathered.constants, "BLOCK_N": 64})
    assert "serializes its products" in compile_case(narrow, "sm_90").faults(narrow, "sm_90")


def test_the_gate_sees_products_made_by_hand() -> None:
    case = replace(CASES["bf16"]["rope"][0], matrix="wide")
    assert compile_case(case, "sm_90").faults(case, "sm_90") == ["no wgmma.mma_async"]
