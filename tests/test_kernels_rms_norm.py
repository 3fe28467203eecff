"""rms_norm on the CPU: the rule, a case by hand, what it refuses. The twin is tested in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_obeys_rule, assert_obeys_rule_of_sum, results
from torch import Tensor

from workbench_kernels import rms_norm
from workbench_kernels.rms_norm import NormedSum, fits_twin, reference, reference_of_sum
from workbench_kernels.tier import resolve

EPS = 1e-6


def make(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape).to(dtype), torch.randn(shape[-1]).to(dtype)


def auto(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def definition(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, *ODD_SIZES])
@pytest.mark.parametrize("width", [*ODD_SIZES, 256])
def test_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(auto, definition, make(rows, width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_obeys_the_rule_over_many_rows(dtype: torch.dtype) -> None:
    assert_obeys_rule(auto, definition, make(20_000, 60, dtype=dtype))


def auto_of_sum(x: Tensor, residual: Tensor, weight: Tensor) -> NormedSum:
    return rms_norm(x, weight, EPS, residual)


def definition_of_sum(x: Tensor, residual: Tensor, weight: Tensor) -> NormedSum:
    return reference_of_sum(x, residual, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, *ODD_SIZES])
@pytest.mark.parametrize("width", [1, 60])
def test_a_sum_obeys_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = make(rows, width, dtype=dtype)
    assert_obeys_rule_of_sum(auto_of_sum, definition_of_sum, x, torch.randn(rows, width).to(dtype), weight)


def test_a_sum_is_normed_as_the_residual_stream_holds_it() -> None:
    x, weight = make(2, 3, 16, dtype=torch.bfloat16)
    residual = torch.randn(2, 3, 16).to(torch.bfloat16)
    for recorded in (False, True):
        y, total = rms_norm(x.requires_grad_(recorded), weight, EPS, residual)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(y, rms_norm(total, weight, EPS))


def test_gradients_of_a_sum_by_finite_differences() -> None:
    x, weight = make(3, 5, dtype=torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, torch.randn(3, 5, dtype=torch.float64), weight))
    assert torch.autograd.gradcheck(auto_of_sum, inputs)


def test_a_residual_of_another_shape_or_dtype_is_refused() -> None:
    x, weight = make(3, 5, dtype=torch.float32)
    for residual in (torch.ones(1, 5), torch.ones(3, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"residual \(.*\) must be as x is \(torch.float32 \[3, 5\]\)"):
            rms_norm(x, weight, EPS, residual)


def test_takes_any_axes_and_strides() -> None:
    x, weight = make(2, 3, 4, 16, dtype=torch.float32)
    grad = torch.ones(1, 1, 1, 1)
    expected = results(definition, (x.transpose(1, 2), weight), grad.expand(2, 4, 3, 16))
    found = results(auto, (x.transpose(1, 2), torch.stack([weight, weight], -1)[:, 0]), grad.expand(2, 4, 3, 16))
    torch.testing.assert_close(found, expected)


def test_a_case_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    weight = torch.tensor([1.0, -2.0])
    root = 12.5**0.5
    expected = torch.tensor([[3.0 / root, -8.0 / root], [0.0, 0.0]])
    torch.testing.assert_close(rms_norm(x, weight, 1e-12), expected)


def test_input_is_left_alone() -> None:
    x, weight = make(3, 8, dtype=torch.float32)
    before = x.clone()
    auto(x, weight)
    assert torch.equal(x, before)


def test_gradients_by_finite_differences() -> None:
    x, weight = make(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(auto, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_is_registered_correctly(dtype: torch.dtype) -> None:
    x, weight = (tensor.requires_grad_() for tensor in make(2, 3, 16, dtype=dtype))
    torch.library.opcheck(torch.ops.workbench_kernels.rms_norm.default, (x, weight, EPS, False))
    residual = torch.randn(2, 3, 16).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.workbench_kernels.add_rms_norm.default, (x, residual, weight, EPS, False))


def test_compiles_as_one_graph() -> None:
    inputs = make(4, 16, dtype=torch.float32)
    grad = torch.randn(4, 16)
    compiled = torch.compile(auto, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(auto, inputs, grad), rtol=0, atol=0)


def test_a_sum_compiles_as_one_graph_whatever_its_strides() -> None:
    x, weight = make(4, 3, 16, dtype=torch.float32)
    residual = torch.randn(3, 4, 16).transpose(0, 1)

    def both(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(auto_of_sum(x, residual, weight))

    grad = torch.randn(8, 3, 16)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = (x, residual, weight)
    torch.testing.assert_close(results(compiled, inputs, grad), results(both, inputs, grad), rtol=0, atol=0)
    swapped = tuple(tensor.detach().requires_grad_() for tensor in (residual.transpose(0, 1), x.transpose(0, 1)))
    torch.library.opcheck(torch.ops.workbench_kernels.add_rms_norm.default, (*swapped, weight, EPS, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"x \[2, 4\] must be \[\.\.\., D\]"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "one floating dtype"),
        ({"x": torch.ones(2, 4, dtype=torch.int64), "weight": torch.ones(4, dtype=torch.int64)}, "one floating dtype"),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": EPS, **change})


@pytest.mark.parametrize(
    ("width", "tier"), [(1, "fused"), (4096, "fused"), (4097, "reference"), (8192, "fused"), (8208, "reference")]
)
def test_auto_on_a_gpu_takes_the_definition_for_widths_without_a_twin(
    width: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    place = torch.device("cuda"), torch.bfloat16
    assert resolve("rms_norm", "auto", *place, fits=fits_twin(width)) == tier
    assert resolve("rms_norm", "fused", *place, fits=fits_twin(width)) == "fused", "never another form instead"
