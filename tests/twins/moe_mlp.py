"""The Triton twin of moe_mlp; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_obeys_rule, results
from mixture_cases import make, make_biased, with_biases
from torch import Tensor

from workbench_kernels import moe_mlp
from workbench_kernels.moe_mlp import reference

fused = partial(moe_mlp, impl="fused")
LARGE = (90, 72, 136) if INTERPRETED else (4096, 1024, 512)
MUTATIONS = [
    Mutation("moe_mlp_fwd_kernel", "tl.load(weights_ptr + token * A + a", "tl.load(weights_ptr + token * A"),
    Mutation("moe_mlp_fwd_kernel", "known = token < num_tokens", "known = token < num_tokens - 1"),
    Mutation("moe_mlp_bwd_kernel", "tl.load(weights_ptr + pair", "tl.load(weights_ptr + row"),
    Mutation("moe_mlp_bwd_kernel", "gate <= limit", "gate <= limit + 10"),
    Mutation("moe_mlp_bwd_kernel", "(1.0 - sigmoid))", "(1.0 + sigmoid))"),
    Mutation("moe_mlp_bwd_kernel", "(pair // A)", "(row // A)"),
    Mutation("moe_mlp_bwd_kernel", "b2_ptr + expert[:, None] * K", "b2_ptr + expert[:, None] * 0"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(0, 16, 8), (1, 1, 1), (40, 33, 60), (129, 16, 8), LARGE])
def test_obeys_the_rule(tokens: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused, reference, make(tokens, width, hidden, dtype, device=DEVICE))


@pytest.mark.parametrize(("experts", "active", "used"), [(1, 1, 1), (6, 1, 1), (6, 3, 3), (6, 6, 6)])
def test_obeys_the_rule_however_tokens_choose(experts: int, active: int, used: int) -> None:
    inputs = make(20, 16, 24, torch.float32, experts=experts, active=active, used=used, device=DEVICE)
    assert_obeys_rule(fused, reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1, 1, 1), (40, 24, 16), (9, 257, 33)])
def test_obeys_the_rule_with_biases_and_a_clamp(tokens: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = make_biased(tokens, width, hidden, dtype, used=5, device=DEVICE)
    assert_obeys_rule(with_biases(fused), with_biases(reference), inputs)


@pytest.mark.parametrize(("width", "hidden"), [(0, 5), (5, 0)])
def test_biases_have_gradients_where_a_width_is_zero(width: int, hidden: int) -> None:
    assert_obeys_rule(
        with_biases(fused), with_biases(reference), make_biased(9, width, hidden, torch.float32, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_obeys_the_rule_with_float32_router_weights(dtype: torch.dtype) -> None:
    assert_obeys_rule(fused, reference, make(30, 32, 16, dtype, weights_dtype=torch.float32, device=DEVICE))


def test_gradients_of_an_unchosen_expert_are_exactly_zero() -> None:
    x, w13, w2, indices, weights, b13, b2 = make_biased(12, 16, 16, torch.float32, experts=4, used=3, device=DEVICE)
    for tensor in (w13, w2, b13, b2):
        tensor[3] = float("nan")
    inputs = (x, w13, w2, indices, weights, b13, b2)
    _, grad_x, *grads = results(with_biases(fused), inputs, torch.ones(12, 16, device=DEVICE))
    for grad in (grads[0], grads[1], grads[3], grads[4]):
        assert torch.equal(grad[3], torch.zeros_like(grad[3]))
    assert grad_x.isfinite().all()


def test_only_the_gate_and_up_products_are_kept() -> None:
    x, w13, w2, indices, weights = make(40, 16, 8, torch.float32, device=DEVICE)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused(x.requires_grad_(), w13, w2, indices, weights)
    inputs = {tuple(tensor.shape) for tensor in (x, w13, w2, indices)}
    assert {shape for shape in kept if shape not in inputs and len(shape) > 1} == {(80, 16)}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    proof = partial(test_obeys_the_rule_with_biases_and_a_clamp, 40, 24, 16, torch.float32)
    assert_seen("moe_mlp", mutation, tmp_path, proof)


def test_op_is_registered_correctly() -> None:
    inputs = [x.requires_grad_(x.is_floating_point()) for x in make_biased(9, 16, 8, torch.float32, device=DEVICE)]
    torch.library.opcheck(torch.ops.workbench_kernels.moe_mlp.default, (*inputs, 0.7, 1.7, 1.0, True))


def test_compiles_as_one_graph() -> None:
    inputs = make(12, 16, 8, torch.float32, device=DEVICE)
    grad = torch.randn(12, 16, device=DEVICE)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(fused, inputs, grad), rtol=0, atol=0)


def test_refuses_too_many_experts() -> None:
    inputs = make(1, 1, 1, torch.float32, experts=2048, device=DEVICE)
    with pytest.raises(ValueError, match="up to 2047 experts, not 2048"):
        fused(*inputs)
