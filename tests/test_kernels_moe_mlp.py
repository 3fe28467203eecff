"""moe_mlp: the rule, experts that no token chose, routing by hand."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_obeys_rule, results
from mixture_cases import make, make_biased, with_biases
from torch import Tensor

from workbench_kernels import GatedActivation, moe_mlp
from workbench_kernels.expert_order import group_unit, sort_by_expert
from workbench_kernels.moe_mlp import FEW_PAIRS, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", ODD_SIZES)
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (60, 129), (64, 32)])
def test_obeys_the_rule(tokens: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(moe_mlp, reference, make(tokens, width, hidden, dtype))


@pytest.mark.parametrize("width", [15, 32])
@pytest.mark.parametrize(("experts", "active", "used"), [(1, 1, 1), (6, 1, 1), (6, 3, 3), (6, 6, 6)])
def test_obeys_the_rule_however_tokens_choose(experts: int, active: int, used: int, width: int) -> None:
    inputs = make(20, width, width, torch.float32, experts=experts, active=active, used=used)
    assert_obeys_rule(moe_mlp, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "active"), [(1, 1), (1, 8), (3, 1), (5, 8), (9, 7), (9, 8)])
def test_obeys_the_rule_for_a_step_of_decoding(tokens: int, active: int, dtype: torch.dtype) -> None:
    """On both sides of the number of pairs up to which a step without gradients has a form of its own."""
    assert 9 * 7 < FEW_PAIRS < 9 * 8
    inputs = make_biased(tokens, 17, 9, dtype, active=active)
    assert_obeys_rule(with_biases(moe_mlp), with_biases(reference), inputs)


@pytest.mark.parametrize("indices", [[[0, 8]], [[-1, 3]]])
def test_a_step_of_decoding_refuses_experts_that_are_not_there(indices: list[list[int]]) -> None:
    x, w13, w2, _, weights = make(1, 4, 4, torch.float32)
    with pytest.raises(ValueError, match=r"indices span -?\d\.\.\d and must lie in 0\.\.7"), torch.no_grad():
        moe_mlp(x, w13, w2, torch.tensor(indices), weights)


def test_a_token_may_take_an_expert_twice() -> None:
    x, w13, w2, _, weights = make(3, 4, 4, torch.float32)
    twice = torch.tensor([[5, 5], [2, 5], [5, 2]])
    for tokens in (1, 3):
        inputs = x[:tokens], w13, w2, twice[:tokens], weights[:tokens]
        torch.testing.assert_close(moe_mlp(*inputs), reference(*inputs))


def test_obeys_the_rule_without_tokens() -> None:
    assert_obeys_rule(moe_mlp, reference, make(0, 16, 8, torch.float32))


def test_obeys_the_rule_with_float32_router_weights() -> None:
    assert_obeys_rule(moe_mlp, reference, make(60, 64, 32, torch.bfloat16, weights_dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1, 1, 1), (60, 60, 129), (150, 64, 32)])
def test_obeys_the_rule_with_biases_and_a_clamp(tokens: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(with_biases(moe_mlp), with_biases(reference), make_biased(tokens, width, hidden, dtype, used=5))


def test_obeys_the_rule_with_a_clamp_alone() -> None:
    def op(kind, *tensors: Tensor) -> Tensor:
        return kind(*tensors, activation=GatedActivation(limit=0.8))

    inputs = make(60, 64, 32, torch.float32)
    assert_obeys_rule(lambda *t: op(moe_mlp, *t), lambda *t: op(reference, *t), inputs)


def test_a_clamped_case_by_hand() -> None:
    """One expert: gate 1*4+1 = 5 is cut to 2, up 1*-9+1 = -8 to -2; then 2 * sigmoid(1.5*2) * (-2+1) * 10 + 3."""
    x, w13, w2 = torch.tensor([[1.0]]), torch.tensor([[[4.0], [-9.0]]]), torch.tensor([[[10.0]]])
    b13, b2 = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]])
    activation = GatedActivation(limit=2.0, alpha=1.5, offset=1.0)
    choice = (torch.tensor([[0]]), torch.tensor([[0.5]]))
    found = moe_mlp(x, w13, w2, *choice, b13=b13, b2=b2, activation=activation)
    torch.testing.assert_close(found, torch.tensor([[0.5 * (2 / (1 + math.exp(-3)) * -1 * 10 + 3)]]))


def test_a_case_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0]])
    w13 = torch.tensor([[[1.0], [3.0]], [[2.0], [5.0]]])  # gate, up of two experts
    w2 = torch.tensor([[[10.0]], [[100.0]]])
    indices = torch.tensor([[1, 0], [0, 1]])
    weights = torch.tensor([[0.25, 0.5], [1.0, 0.0]])

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    first = 0.25 * silu(2) * 5 * 100 + 0.5 * silu(1) * 3 * 10
    second = silu(2) * 6 * 10
    torch.testing.assert_close(moe_mlp(x, w13, w2, indices, weights), torch.tensor([[first], [second]]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("width", [5, 16])
def test_gradients_of_an_unchosen_expert_are_exactly_zero(width: int, impl: str) -> None:
    x, w13, w2, indices, weights = make(12, width, width, torch.float32, experts=4, used=3)
    w13[3] = w2[3] = float("nan")
    b13, b2 = torch.full((4, 2 * width), 0.1), torch.full((4, width), 0.1)
    b13[3] = b2[3] = float("nan")

    def op(*tensors: Tensor) -> Tensor:
        return moe_mlp(*tensors[:5], b13=tensors[5], b2=tensors[6], impl=impl)

    inputs = (x, w13, w2, indices, weights, b13, b2)
    _, grad_x, *grads = results(op, inputs, torch.ones(12, width))
    for grad in (grads[0], grads[1], grads[3], grads[4]):
        assert torch.equal(grad[3], torch.zeros_like(grad[3]))
    assert grad_x.isfinite().all()


def test_groups_are_filled_up_to_a_unit_and_keep_the_order_of_tokens() -> None:
    indices = make(40, 1, 1, torch.float32, experts=5, active=3, used=4)[3]
    order = sort_by_expert(indices, 5, unit=16)
    starts = [0, *order.offs_E.tolist()]
    assert all(start % 16 == 0 for start in starts) and starts[-1] <= len(order.pair_M) == 40 * 3 + 5 * 15
    for expert in range(5):
        rows = order.row_NA[indices == expert]
        assert rows.tolist() == list(range(starts[expert], starts[expert] + len(rows)))
        assert starts[expert + 1] - starts[expert] - len(rows) in range(16)
    assert torch.equal(order.pair_M[order.row_NA.flatten().long()], torch.arange(120, dtype=torch.int32))
    both = torch.cat((order.row_NA.flatten().long(), order.padding_P))
    assert torch.equal(both.sort().values, torch.arange(len(order.pair_M)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_obeys_the_rule_with_groups_filled_up(dtype: torch.dtype) -> None:
    inputs = make(150, 64, 32, dtype, used=5)
    assert group_unit(dtype, inputs[3].numel(), 8) > 1
    assert_obeys_rule(moe_mlp, reference, inputs)


def test_a_bad_token_reaches_only_the_experts_that_it_chose() -> None:
    x, w13, w2, indices, weights = make(150, 16, 8, torch.bfloat16)
    x[0], indices[0] = float("nan"), torch.tensor([3, 5])  # token 0 is also what padding rows point at
    out, _, grad_w13, grad_w2, _ = results(moe_mlp, (x, w13, w2, indices, weights), torch.ones(150, 16).bfloat16())
    assert out[1:].isfinite().all()
    for grad in (grad_w13, grad_w2):
        assert grad.isfinite().flatten(1).all(1).tolist() == [expert not in (3, 5) for expert in range(8)]


def test_takes_any_strides() -> None:
    x, w13, w2, indices, weights = make(12, 16, 8, torch.float32)
    expected = results(reference, (x, w13, w2, indices, weights), torch.ones(12, 16))
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (x, w13, w2, indices, weights)]
    torch.testing.assert_close(results(moe_mlp, strided, torch.ones(1, 1).expand(12, 16)), expected)


def test_gradients_by_finite_differences() -> None:
    x, w13, w2, indices, weights = make(5, 4, 3, torch.float64, experts=3)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, w13, w2, weights))
    assert torch.autograd.gradcheck(lambda a, b, c, d: moe_mlp(a, b, c, indices, d), inputs)
    biases = tuple(torch.randn(shape).double().requires_grad_() for shape in ((3, 6), (3, 4)))

    def clamped(*tensors: Tensor) -> Tensor:
        return with_biases(moe_mlp)(*tensors[:3], indices, *tensors[3:])

    assert torch.autograd.gradcheck(clamped, (*inputs, *biases))


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"), [(6, 5, torch.float32), (6, 16, torch.float32), (60, 16, torch.bfloat16)]
)
def test_op_is_registered_correctly(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, w13, w2, indices, weights = make(tokens, width, width, dtype, experts=4)
    inputs = tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in (x, w13, w2, indices, weights))
    biases = tuple(tensor.to(dtype).requires_grad_() for tensor in (torch.randn(4, 2 * width), torch.randn(4, width)))
    for rest in ((None, None, math.inf, 1.0, 0.0), (*biases, 0.7, 1.7, 1.0)):
        torch.library.opcheck(torch.ops.workbench_kernels.moe_mlp.default, (*inputs, *rest, False))


def test_compiles_as_one_graph() -> None:
    inputs = make(12, 16, 8, torch.float32)
    grad = torch.randn(12, 16)
    compiled = torch.compile(moe_mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(moe_mlp, inputs, grad), rtol=0, atol=0)
    biased = make_biased(12, 16, 8, torch.float32)
    compiled = torch.compile(with_biases(moe_mlp), backend="aot_eager", fullgraph=True)
    expected = results(with_biases(moe_mlp), biased, grad)
    torch.testing.assert_close(results(compiled, biased, grad), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x has 1 axes"),
        ({"x": torch.zeros(3, 5)}, r"x \[3, 5\]"),
        ({"w13": torch.zeros(2, 6, 4)}, r"w13 \[2, 6, 4\]"),
        ({"w2": torch.zeros(2, 4, 4, dtype=torch.float64)}, "one floating dtype"),
        ({"indices": torch.zeros(3, 2, dtype=torch.int32)}, "must be int64"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int64)}, r"\[3, A\]"),
        ({"indices": torch.full((3, 2), 2)}, r"indices span 2\.\.2 and must lie in 0\.\.1"),
        ({"indices": torch.full((3, 2), -1)}, r"indices span -1\.\.-1"),
        ({"weights": torch.zeros(3, 3)}, r"weights \(torch.float32 \[3, 3\]\)"),
        ({"weights": torch.zeros(3, 2, dtype=torch.float64)}, "float64"),
        ({"b13": torch.zeros(2, 4)}, r"b13 \(torch.float32 \[2, 4\]\) must be \[2, 8\] in torch.float32"),
        ({"b2": torch.zeros(2, 4, dtype=torch.float64)}, r"b2 \(torch.float64 \[2, 4\]\) must be"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 4),
        "w13": torch.zeros(2, 8, 4),
        "w2": torch.zeros(2, 4, 4),
        "indices": torch.zeros(3, 2, dtype=torch.int64),
        "weights": torch.zeros(3, 2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        moe_mlp(**arguments)


@pytest.mark.parametrize(("factor", "weight"), [(1e-4, 1e5), (3e3, 1e-8)])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_float32_router_weights_may_be_none_of_float16(tokens: int, factor: float, weight: float) -> None:
    x, w13, w2, indices, _ = make(tokens, 16, 16, torch.float16)
    weights, w2 = torch.full(indices.shape, weight), (w2 * factor).half()
    expected = reference(x, w13, w2, indices, weights)
    assert expected.isfinite().all() and expected.any()
    with torch.inference_mode():
        torch.testing.assert_close(moe_mlp(x, w13, w2, indices, weights), expected, rtol=5e-3, atol=1e-7)


def test_gradients_with_float32_router_weights_beyond_float16() -> None:
    x, w13, w2, indices, _ = make(40, 16, 16, torch.float16)
    inputs = x, w13, (w2 * 1e-2).half(), indices, torch.full(indices.shape, 1e5)
    expected = results(reference, inputs, torch.full_like(x, 1e-3))
    for ours, theirs in zip(results(moe_mlp, inputs, torch.full_like(x, 1e-3)), expected, strict=True):
        assert theirs.isfinite().all() and theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2 * theirs.abs().max().item())
