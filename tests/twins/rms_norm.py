"""The Triton twin of rms_norm; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, ODD_SIZES, assert_obeys_rule, assert_obeys_rule_of_sum, results
from torch import Tensor

from workbench_kernels import rms_norm
from workbench_kernels.fused import rms_norm as fused_rms_norm
from workbench_kernels.rms_norm import reference, reference_of_sum

LARGE_ROWS, LARGE_WIDTHS = ([], [8192]) if INTERPRETED else ([20_000], [2048, 7168, 8192])
MUTATIONS = [
    Mutation("rms_norm_fwd_kernel", "/ D + eps", "/ BLOCK_D + eps"),
    Mutation("rms_norm_fwd_kernel", "inside = (row < num_rows)", "inside = (row < num_rows - 1)"),
    Mutation("rms_norm_fwd_kernel", "offset = row[:, None] * D", "offset = row[:, None] * (D - 1)"),
    Mutation("rms_norm_bwd_kernel", "- normal * along", "+ normal * along"),
    Mutation("rms_norm_bwd_kernel", "program * tiles_per_program + tile", "program * tiles_per_program"),
    Mutation("rms_norm_bwd_kernel", "[:, None] / D", "[:, None] / BLOCK_D"),
]


def make(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, width).to(DEVICE, dtype), torch.randn(width).to(DEVICE, dtype)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6, impl="fused")


def definition(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, *ODD_SIZES, *LARGE_ROWS])
@pytest.mark.parametrize("width", [*ODD_SIZES, *LARGE_WIDTHS])
def test_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused, definition, make(rows, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 60), (1, 5), (60, 129), (129, 60), *((n, 7168) for n in LARGE_ROWS)])
def test_a_sum_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = make(rows, width, dtype)
    assert_obeys_rule_of_sum(
        lambda x, residual, weight: rms_norm(x, weight, 1e-6, residual, impl="fused"),
        lambda x, residual, weight: reference_of_sum(x, residual, weight, 1e-6),
        *(x, torch.randn(rows, width).to(DEVICE, dtype), weight),
    )


def test_sums_several_tiles_per_program() -> None:
    rows = fused_rms_norm.MAX_PARTIALS + 4  # of the widest tile of one row
    assert_obeys_rule(fused, definition, make(rows, 1023, torch.float32))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    proof = (
        test_sums_several_tiles_per_program
        if "+ tile" in mutation.right
        else partial(test_obeys_the_rule, 9, 129, torch.float32)
    )
    assert_seen("rms_norm", mutation, tmp_path, proof)


def test_op_is_registered_correctly() -> None:
    x, weight = (tensor.requires_grad_() for tensor in make(4, 16, torch.float32))
    torch.library.opcheck(torch.ops.workbench_kernels.rms_norm.default, (x, weight, 1e-6, True))
    residual = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.workbench_kernels.add_rms_norm.default, (x, residual, weight, 1e-6, True))


def test_compiles_as_one_graph() -> None:
    inputs = make(4, 16, torch.float32)
    grad = torch.randn(4, 16, device=DEVICE)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(fused, inputs, grad), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        *([(torch.bfloat16, 4, "rounds bfloat16 wrongly")] if INTERPRETED else []),
        (torch.float64, 4, "takes float32, float16 or bfloat16"),
        (torch.float32, 4097, "beyond 4096 in multiples of 16, not 4097"),
        (torch.float32, 8208, "up to 8192 numbers"),
    ],
)
def test_refuses(dtype: torch.dtype, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(*make(2, width, dtype))
