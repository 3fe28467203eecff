"""Every Triton twin, run by Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the cases, `interpreted_*`, run in a pytest of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_obeys_rule, assert_obeys_rule_of_sum, results, turned
from torch import Tensor

from workbench_kernels import rms_norm, rope
from workbench_kernels.rms_norm import reference, reference_of_sum
from workbench_kernels.rope import reference as rope_definition


def test_interpreted_cases_pass() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=interpreted_*",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout and " skipped" not in ran.stdout, ran.stdout


def make(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)


def make_rope(batch: int, positions: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    angles = 7 * torch.randn(positions, width // 2)
    return torch.randn(batch, positions, heads, width).to(dtype), angles.cos(), angles.sin()


def fused_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6, impl="fused")


def rms_norm_definition(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, *ODD_SIZES])
@pytest.mark.parametrize("width", [*ODD_SIZES, 8192])
def interpreted_rms_norm_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused_rms_norm, rms_norm_definition, make(rows, width, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(0, 60), (1, 5), (60, 129), (129, 60)])
def interpreted_rms_norm_of_a_sum_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = make(rows, width, dtype)
    assert_obeys_rule_of_sum(
        lambda x, residual, weight: rms_norm(x, weight, 1e-6, residual, impl="fused"),
        lambda x, residual, weight: reference_of_sum(x, residual, weight, 1e-6),
        *(x, torch.randn(rows, width).to(dtype), weight),
    )


def interpreted_rms_norm_sums_several_tiles_per_program() -> None:
    assert_obeys_rule(fused_rms_norm, rms_norm_definition, make(4200, 129, torch.float32))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("batch", "positions", "heads", "width"), [(2, 7, 3, 6), (1, 129, 1, 64), (2, 3, 5, 130)])
def interpreted_rope_obeys_the_rule(
    batch: int, positions: int, heads: int, width: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x, cos, sin = make_rope(batch, positions, heads, width, dtype)
    fused = partial(rope, impl="fused")
    definition = turned(rope_definition, interleaved, cos, sin)
    assert_obeys_rule(turned(fused, interleaved, cos, sin), definition, [x])


@pytest.mark.parametrize("interleaved", [True, False])
def interpreted_rope_takes_strides(interleaved: bool) -> None:
    x, cos, sin = make_rope(2, 5, 3, 9, torch.float32)
    view = x.transpose(1, 2)[..., 1:7]
    turn = cos[:3, :3], sin[:3, :3]
    found = rope(view, *turn, interleaved=interleaved, impl="fused")
    torch.testing.assert_close(found, rope_definition(view, *turn, interleaved=interleaved), rtol=1e-6, atol=1e-6)


def interpreted_rope_op_is_registered_correctly() -> None:
    x, cos, sin = make_rope(1, 4, 2, 6, torch.float32)
    torch.library.opcheck(torch.ops.workbench_kernels.rope.default, (x.requires_grad_(), cos, sin, True, True))


def interpreted_rope_refuses_heads_too_wide() -> None:
    x, cos, sin = make_rope(1, 1, 1, 1026, torch.float32)
    with pytest.raises(ValueError, match="heads of up to 1024 numbers, not 1026"):
        rope(x, cos, sin, interleaved=True, impl="fused")


def interpreted_rms_norm_op_is_registered_correctly() -> None:
    x, weight = (tensor.requires_grad_() for tensor in make(4, 16, torch.float32))
    torch.library.opcheck(torch.ops.workbench_kernels.rms_norm.default, (x, weight, 1e-6, True))
    residual = torch.randn(4, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.workbench_kernels.add_rms_norm.default, (x, residual, weight, 1e-6, True))


def interpreted_rms_norm_compiles_as_one_graph() -> None:
    inputs = make(4, 16, torch.float32)
    grad = torch.randn(4, 16)
    compiled = torch.compile(fused_rms_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(fused_rms_norm, inputs, grad), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.bfloat16, 4, "rounds bfloat16 wrongly"),
        (torch.float64, 4, "takes float32, float16 or bfloat16"),
        (torch.float32, 4097, "beyond 4096 in multiples of 16, not 4097"),
        (torch.float32, 8208, "up to 8192 numbers"),
    ],
)
def interpreted_rms_norm_refuses(dtype: torch.dtype, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_rms_norm(*make(2, width, dtype))
