"""Every Triton twin, run by Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the cases, `interpreted_*`, run in a pytest of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_obeys_rule, results
from torch import Tensor

from workbench_kernels import rms_norm
from workbench_kernels.rms_norm import reference


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


def fused_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6, impl="fused")


def rms_norm_definition(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, *ODD_SIZES])
@pytest.mark.parametrize("width", [*ODD_SIZES, 8192])
def interpreted_rms_norm_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused_rms_norm, rms_norm_definition, make(rows, width, dtype))


def interpreted_rms_norm_sums_several_tiles_per_program() -> None:
    assert_obeys_rule(fused_rms_norm, rms_norm_definition, make(4200, 129, torch.float32))


def interpreted_rms_norm_op_is_registered_correctly() -> None:
    x, weight = (tensor.requires_grad_() for tensor in make(4, 16, torch.float32))
    torch.library.opcheck(torch.ops.workbench_kernels.rms_norm.default, (x, weight, 1e-6, True))


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
