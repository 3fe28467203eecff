"""grouped_mm: the rule, groups without rows, rows without a group."""

from __future__ import annotations

import pytest
import torch
from grouped_cases import NAN, OPTIONS, make, make_with_options
from kernel_rules import ODD_SIZES, assert_obeys_rule, results

from workbench_kernels import SWIGLU, grouped_mm
from workbench_kernels.grouped_mm import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [*ODD_SIZES, 64])
@pytest.mark.parametrize("n", [*ODD_SIZES, 64])
def test_obeys_the_rule(k: int, n: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(grouped_mm, reference, make([0, 60, 1, 0, 129, 0], k, n, dtype, unowned=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("width", [7, 32])
def test_options_obey_the_rule(width: int, name: str, dtype: torch.dtype) -> None:
    inputs, ours, definition = make_with_options([0, 9, 1, 0], width, 5, dtype, name)
    assert_obeys_rule(ours, definition, inputs)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_options_by_finite_differences(name: str) -> None:
    inputs, ours, _ = make_with_options([0, 3, 1], 3, 2, torch.float64, name)
    leaves = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    assert torch.autograd.gradcheck(ours, leaves)


@pytest.mark.parametrize("width", [7, 32])
@pytest.mark.parametrize("sizes", [[5], [0, 9, 0], [0, 0], [3, 0, 4]])
def test_obeys_the_rule_for_one_all_and_no_rows(sizes: list[int], width: int) -> None:
    assert_obeys_rule(grouped_mm, reference, make(sizes, width, 2 * width, torch.float32, unowned=2))


def test_a_case_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.tensor([[[10.0, 1.0]], [[100.0, 0.0]]])
    offs = torch.tensor([1, 2], dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(x, weight, offs), torch.tensor([[12.0], [300.0]]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("width", [5, 16])
def test_rows_and_experts_without_the_other_are_exactly_zero(width: int, impl: str) -> None:
    x, weight, offs = make([4, 0, 3], width, width, torch.float32, unowned=2)
    grad = torch.ones(9, width)
    grad[7:] = NAN
    output, grad_x, grad_weight = results(lambda *inputs: grouped_mm(*inputs, impl=impl), (x, weight, offs), grad)
    for tensor in (output[7:], grad_x[7:], grad_weight[1]):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("width", [5, 16])
def test_takes_any_strides(width: int) -> None:
    x, weight, offs = make([4, 0, 3], width, width, torch.float32)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expected = results(reference, (x, weight, offs), torch.ones(7, width))
    found = results(grouped_mm, (strided, transposed, offs), torch.ones(1, 1).expand(7, width))
    torch.testing.assert_close(found, expected)


def test_gradients_by_finite_differences() -> None:
    x, weight, offs = make([3, 0, 2], 4, 3, torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, offs), (x, weight))


@pytest.mark.parametrize("width", [5, 16])
def test_op_is_registered_correctly(width: int) -> None:
    x, weight, offs = make([3, 0, 2], width, width, torch.float32, unowned=1)
    x[5:] = 0.0  # opcheck compares with itself, and NaN is unequal to itself
    torch.library.opcheck(
        torch.ops.workbench_kernels.grouped_mm.default, (x.requires_grad_(), weight.requires_grad_(), offs, False)
    )
    rows = x.detach()
    torch.library.opcheck(torch.ops.workbench_kernels.grouped_mm_weight_grad.default, (rows, rows, offs, False))


def test_compiles_as_one_graph() -> None:
    inputs = make([3, 0, 2], 16, 8, torch.float32)
    grad = torch.randn(5, 8)
    compiled = torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(grouped_mm, inputs, grad), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"\[3, 5\] must be \[M, K\]"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "one floating dtype"),
        ({"offs": torch.tensor([1, 2])}, "must be int32"),
        ({"offs": torch.tensor([1, 2, 3], dtype=torch.int32)}, "E = 2"),
        ({"offs": torch.tensor([2, 1], dtype=torch.int32)}, "must not decrease"),
        ({"offs": torch.tensor([2, 4], dtype=torch.int32)}, r"0\.\.3"),
        ({"offs": torch.tensor([-1, 2], dtype=torch.int32)}, "must not decrease"),
        ({"impl": "fast"}, "impl='fast'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
        ({"bias": torch.zeros(2, 5)}, r"bias \(torch.float32 \[2, 5\]\) must be \[2, 6\]"),
        ({"gather_idx": torch.zeros(3)}, r"gather_idx \(torch.float32 \[3\]\) must be int32 or int64 \[M\], M = 3"),
        ({"scatter_idx": torch.zeros(2, dtype=torch.int32)}, r"scatter_idx .* M = 3"),
        ({"row_scale": torch.zeros(2)}, r"row_scale .* must be floating \[3\]"),
        ({"x": torch.zeros(0, 4), "gather_idx": torch.zeros(3, dtype=torch.int64)}, "names 3 rows and x has none"),
        ({"gather_idx": torch.tensor(0)}, "must have one axis"),
        ({"out_dtype": torch.int32}, "out_dtype=torch.int32 must be floating"),
        ({"weight": torch.zeros(2, 5, 4), "activation": SWIGLU}, r"must be \[E, 2N, K\] with an activation"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(2, 6, 4),
        "offs": torch.tensor([1, 2], dtype=torch.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        grouped_mm(**arguments)


def test_a_row_cut_from_a_wider_tensor() -> None:
    weight, ends = torch.randn(2, 8, 16, requires_grad=True), torch.tensor([1, 1], dtype=torch.int32)
    wide, grad = torch.randn(1, 17), torch.randn(1, 9)
    found = grouped_mm(wide[:, :16], weight, ends)
    torch.testing.assert_close(found, wide[:, :16] @ weight[0].T)
    (grad_weight,) = torch.autograd.grad(found, weight, grad[:, :8])
    torch.testing.assert_close(grad_weight[0], grad[:, :8].T @ wide[:, :16])
    assert grouped_mm(wide[:0, :16], weight, torch.zeros_like(ends)).shape == (0, 8)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_rows_may_be_scattered_by_int32_and_what_nobody_owns_gathered_from_nowhere(impl: str) -> None:
    x, weight, ends = torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([1, 2], dtype=torch.int32)
    gather, scatter = torch.tensor([2, 0, -1]), torch.tensor([1, 2, 0], dtype=torch.int32)
    found = grouped_mm(x, weight, ends, gather_idx=gather, scatter_idx=scatter, impl=impl)
    torch.testing.assert_close(found, torch.stack((torch.zeros(5), weight[0] @ x[2], weight[1] @ x[0])))
