"""Every Triton twin on a GPU. Needs torch, triton, numpy and pytest, and nothing else."""

from __future__ import annotations

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_obeys_rule, assert_obeys_rule_of_sum, turned
from torch import Tensor

from workbench_kernels import rms_norm, rope
from workbench_kernels.rms_norm import reference, reference_of_sum
from workbench_kernels.rope import reference as rope_definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]


def make(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, width).to("cuda", dtype), torch.randn(width).to("cuda", dtype)


def fused_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6)


def rms_norm_definition(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, *ODD_SIZES, 20_000])
@pytest.mark.parametrize("width", [*ODD_SIZES, 2048, 7168])
def test_rms_norm_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused_rms_norm, rms_norm_definition, make(rows, width, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 60), (60, 129), (20_000, 60), (129, 7168)])
def test_rms_norm_of_a_sum_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = make(rows, width, dtype)
    assert_obeys_rule_of_sum(
        lambda x, residual, weight: rms_norm(x, weight, 1e-6, residual),
        lambda x, residual, weight: reference_of_sum(x, residual, weight, 1e-6),
        *(x, torch.randn(rows, width).to("cuda", dtype), weight),
    )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 129, 3, 6), (1, 60, 16, 64), (2, 7, 5, 130), (1, 2000, 128, 64)])
def test_rope_obeys_the_rule(sizes: tuple[int, int, int, int], dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(sizes).to("cuda", dtype)
    angles = 7 * torch.randn(sizes[1], sizes[3] // 2, device="cuda")

    cos, sin = angles.cos(), angles.sin()
    assert_obeys_rule(turned(rope, interleaved, cos, sin), turned(rope_definition, interleaved, cos, sin), [x])


def test_rms_norm_op_is_registered_correctly() -> None:
    x, weight = (tensor.requires_grad_() for tensor in make(60, 129, torch.float32))
    torch.library.opcheck(torch.ops.workbench_kernels.rms_norm.default, (x, weight, 1e-6, True))
