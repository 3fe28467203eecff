"""The Triton twin of scaled_mm_blockwise; see tests/test_kernels_twins.py."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_exact, uninitialized_memory_is_nan
from torch import Tensor

import workbench_kernels.fused.scaled_mm_blockwise
from workbench_kernels import quantize_blockwise, scaled_mm_blockwise
from workbench_kernels.quantize_blockwise import FP8, WIDTH
from workbench_kernels.scaled_mm_blockwise import reference

# Of float32 the matrix units of sm_90 keep about 14 bits within 128 columns, which only its rounded forms hide.
OUT_DTYPES = [dtype for dtype in DTYPES if INTERPRETED or dtype != torch.float32]
# The interpreter has the tiles of sm_90. Those of sm_80 and gfx942 decode E4M3 numbers, which any device can do.
ARCHITECTURES = [None, "sm_80", "gfx942"]
LARGE = [] if INTERPRETED else [(4096, 7168, 2048), (64, 2112, 7168)]
MUTATIONS = [
    Mutation("scaled_mm_blockwise_fwd_kernel", "scale_a_row_ptr + start // WIDTH", "scale_a_row_ptr"),
    Mutation("scaled_mm_blockwise_fwd_kernel", "scale_b_row_ptr + start // WIDTH", "scale_b_row_ptr"),
    Mutation("scaled_mm_blockwise_fwd_kernel", "* BLOCK_N // WIDTH * num_blocks", "* 0"),
    Mutation("scaled_mm_blockwise_fwd_kernel", "row_inside, column_inside = row < num_rows, column < N",
             "row_inside, column_inside = row < num_rows, column < N - 1"),
    Mutation("scaled_mm_blockwise_fwd_kernel", "k < K - start", "k < K - start - 1"),
    Mutation("scaled_mm_blockwise_fwd_kernel", "tl.minimum(tiles_m - first_m, GROUP_M)", "GROUP_M"),
    Mutation("decoded", "* 256.0", "* 128.0"),
    Mutation("decoded", "(code & 0x80)", "(code & 0x00)"),
    Mutation("decoded", "magnitude == 0x7F", "magnitude == 0x80"),
]  # fmt: skip

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make(m: int, n: int, k: int) -> Inputs:
    torch.manual_seed(0)
    x, weight = torch.randn(m, k) * torch.rand(m, 1).exp2(), torch.randn(n, k) * (1 + torch.arange(n)[:, None] // WIDTH)
    a, scale_a = quantize_blockwise(x.to(DEVICE), impl="reference")
    b, scale_b = quantize_blockwise(weight.to(DEVICE), block=(WIDTH, WIDTH), impl="reference")
    return a, b, scale_a, scale_b


def fused(*inputs: Tensor, out_dtype: torch.dtype = torch.float16, architecture: str | None = None) -> Tensor:
    """The twin, with the tiles of another architecture if one is given."""
    if architecture is None:
        return scaled_mm_blockwise(*inputs, out_dtype=out_dtype, impl="fused")
    with pytest.MonkeyPatch.context() as patch:
        # Looked up at each call: a mutated twin stands there too.
        patch.setattr(workbench_kernels.fused.scaled_mm_blockwise, "architecture_of", lambda device: architecture)
        return scaled_mm_blockwise(*inputs, out_dtype=out_dtype, impl="fused")


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "sizes", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (60, 129, 60), (129, 60, 129), (20, 150, 272), *LARGE]
)
def test_obeys_the_rule(sizes: tuple[int, int, int], architecture: str | None, out_dtype: torch.dtype) -> None:
    inputs = make(*sizes)
    found = fused(*inputs, out_dtype=out_dtype, architecture=architecture)
    with uninitialized_memory_is_nan():
        assert torch.equal(fused(*inputs, out_dtype=out_dtype, architecture=architecture), found)
    assert found.shape == sizes[:2] and found.dtype == out_dtype
    assert_exact("output", found, reference(*inputs, out_dtype), reference(*inputs, torch.float64))


def test_every_tile_is_multiplied_once() -> None:
    """More tiles of rows than one group holds, and the last group is smaller."""
    inputs = make(9 * 128 + 1, 129, 16)
    with uninitialized_memory_is_nan():
        found = fused(*inputs)
    assert_exact("output", found, reference(*inputs, torch.float16), reference(*inputs, torch.float64))


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:] if INTERPRETED else ARCHITECTURES)
def test_nan_stays_in_its_row(architecture: str | None) -> None:
    """Without the matrix units of sm_90: their product in the interpreter takes NaN for 480."""
    a, b, scale_a, scale_b = make(5, 140, 200)
    expected = fused(a, b, scale_a, scale_b, architecture=architecture)
    a[2, 199] = math.nan
    scale_a[4, 1] = math.nan
    found = fused(a, b, scale_a, scale_b, architecture=architecture)
    assert found[[2, 4]].isnan().all() and torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_takes_any_strides_and_decodes_every_number() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float().nan_to_num(0).to(DEVICE, FP8)  # one row of 256
    a, b = torch.cat((every, every)).view(2, 256), torch.eye(256, device=DEVICE).to(FP8)
    scale_a, scale_b = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    for architecture in ARCHITECTURES:
        found = fused(a, b.T, scale_a.T, scale_b.T, architecture=architecture)
        assert torch.equal(found, a.half())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    if mutation.wrong == "GROUP_M":
        proof = test_every_tile_is_multiplied_once
    elif mutation.right == "magnitude == 0x7F":
        proof = partial(test_nan_stays_in_its_row, "sm_80")
    else:
        architecture = "sm_80" if mutation.kernel == "decoded" else None
        proof = partial(test_obeys_the_rule, (20, 150, 272), architecture, torch.float32)
    assert_seen("scaled_mm_blockwise", mutation, tmp_path, proof)


def test_op_is_registered_correctly() -> None:
    op = torch.ops.workbench_kernels.scaled_mm_blockwise.default
    # The test of the schema multiplies the arguments, which torch cannot do in FP8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (*make(5, 130, 140), torch.float16, True), test_utils=checks)


def test_compiles_as_one_graph() -> None:
    inputs = make(5, 130, 140)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), fused(*inputs))


@pytest.mark.parametrize(
    ("out_dtype", "message"),
    [
        *([(torch.bfloat16, "rounds bfloat16 wrongly")] if INTERPRETED else []),
        (torch.float64, "takes float32, float16 or bfloat16"),
    ],
)
def test_refuses(out_dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(*make(2, 3, 5), out_dtype=out_dtype)
