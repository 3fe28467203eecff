"""The Triton twin of linear_cross_entropy; see tests/test_kernels_twins.py."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_obeys_rule, most_bytes, results
from torch import Tensor

from workbench_kernels import linear_cross_entropy
from workbench_kernels.fused import linear_cross_entropy as twin
from workbench_kernels.linear_cross_entropy import Terms

OP = importlib.import_module("workbench_kernels.linear_cross_entropy")  # the module: the package's name is the function
SEVERAL_BLOCKS = 2 * twin.launch_for(5000).block_v + 905
LARGE = [] if INTERPRETED else [(4099, 512, 50_257), (300, 64, 131_072)]
TERMS = [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.3, "z_loss": 0.02, "ignore_index": 3}]
ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 0.01}
MUTATIONS = [
    Mutation("linear_cross_entropy_fwd_kernel", "total * tl.exp(maximum - higher) +", "total +"),
    Mutation(
        "linear_cross_entropy_fwd_kernel",
        "tl.where(column < V, logits, float",
        "tl.where(column < V - 1, logits, float",
    ),
    Mutation(
        "linear_cross_entropy_fwd_kernel", "tl.where(column < V, logits, 0.0)", "tl.where(column < V - 1, logits, 0.0)"
    ),
    Mutation("linear_cross_entropy_fwd_kernel", "+ (maximum - chosen)", "- (maximum - chosen)"),
    Mutation("linear_cross_entropy_fwd_kernel", "summed / V", "summed / BLOCK_V"),
    Mutation("linear_cross_entropy_fwd_kernel", "tl.where(ignored, 0.0, loss)", "loss"),
    Mutation("linear_cross_entropy_fwd_kernel", "tl.float64) + log_total", "tl.float64)"),
    Mutation("linear_cross_entropy_fwd_kernel", "logits_ptr + row * STRIDE", "logits_ptr + row * V"),
    Mutation("linear_cross_entropy_bwd_kernel", "offset = row * STRIDE", "offset = row * V"),
    Mutation("linear_cross_entropy_bwd_kernel", "tl.program_id(1).to(tl.int64) * BLOCK_V", "tl.program_id(1) * 64"),
    Mutation("linear_cross_entropy_bwd_kernel", "pull * softmax", "pull"),
    Mutation("linear_cross_entropy_bwd_kernel", "label_smoothing / V", "label_smoothing / BLOCK_V"),
    Mutation("linear_cross_entropy_bwd_kernel", "tl.where(target == ignore_index, 0.0, grad_logits)", "grad_logits"),
    Mutation("linear_cross_entropy_bwd_kernel", "logits - lse - rest", "logits - lse"),
]


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every third token is ignored by the default index, and some have the token 3."""
    torch.manual_seed(0)
    target = torch.randint(vocabulary, (tokens,))
    target[2::3] = -100
    target[1::7] = min(3, vocabulary - 1)
    input, linear_weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    return input.to(DEVICE, dtype), linear_weight.to(DEVICE, dtype), target.to(DEVICE)


def of(op: Callable[..., Tensor], target: Tensor, **options) -> Callable[..., Tensor]:
    return lambda input, linear_weight: op(input, linear_weight, target, **options)


fused, reference = (partial(linear_cross_entropy, impl=impl) for impl in ("fused", "reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", TERMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_obeys_the_rule(reduction: str, options: dict, dtype: torch.dtype) -> None:
    input, linear_weight, target = make(10, 12, 129, dtype)
    target = target.clamp(min=0) if "ignore_index" in options else target
    options = {"reduction": reduction, **options}
    assert_obeys_rule(of(fused, target, **options), of(reference, target, **options), (input, linear_weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"),
    [(0, 4, 5), (1, 1, 1), (5, 60, 1), (4, 0, 7), (60, 129, 60), (129, 60, 1024), (5, 9, SEVERAL_BLOCKS), *LARGE],
)
def test_obeys_the_rule_at_any_size(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    input, linear_weight, target = make(tokens, width, vocabulary, dtype)
    options = {"reduction": "none", **ALL_TERMS}
    assert_obeys_rule(of(fused, target, **options), of(reference, target, **options), (input, linear_weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_make_no_difference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "WORKSPACE_BYTES", 7 * twin.stride_for(129) * dtype.itemsize)
    test_obeys_the_rule("mean", TERMS[2], dtype)
    test_obeys_the_rule("none", TERMS[0], dtype)


def test_holds_the_logits_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 20, 2000
    input, linear_weight, target = make(tokens, 4, vocabulary, torch.float32)
    workspace = 3 * twin.stride_for(vocabulary) * 4
    monkeypatch.setattr(OP, "WORKSPACE_BYTES", workspace)
    terms, small = Terms(-100, 0.1), 64 * tokens
    loss, lse = twin.forward(input, linear_weight, target, terms)
    assert workspace <= most_bytes(lambda: twin.forward(input, linear_weight, target, terms)) <= workspace + small
    gradients = input.nbytes + linear_weight.nbytes
    made = most_bytes(lambda: twin.backward(loss, lse, input, linear_weight, target, lse, terms, True, True))
    assert workspace + gradients <= made <= workspace + gradients + small


def test_large_logits_cost_no_digits() -> None:
    """An offset of all logits changes nothing; in float32 their logsumexp alone would be wrong by up to 0.002."""
    input, linear_weight = torch.ones(1, 1, device=DEVICE), torch.tensor([[60_000.0], [60_001.0]], device=DEVICE)
    target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss, _, grad = results(of(fused, target), (input, linear_weight), torch.ones((), device=DEVICE))
    torch.testing.assert_close(loss.item(), math.log1p(math.e), rtol=1e-6, atol=0)
    share = math.e / (1 + math.e)
    torch.testing.assert_close(grad.flatten().tolist(), [-share, share], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    proof = (
        test_large_logits_cost_no_digits
        if "rest" in mutation.right
        else partial(test_obeys_the_rule_at_any_size, 5, 9, SEVERAL_BLOCKS, torch.float32)
    )
    assert_seen("linear_cross_entropy", mutation, tmp_path, proof)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_target_out_of_range_makes_loss_and_gradients_nan(reduction: str) -> None:
    """A GPU cannot raise without waiting; the twin's own functions do the same on a CPU."""
    input, linear_weight, target = make(4, 3, 5, torch.float32)
    for wrong in (-1, 5, 2**40):
        target[0], target[1] = wrong, 4
        terms = Terms(-100, 0.1)
        loss, lse = twin.forward(input, linear_weight, target, terms)
        assert loss.isnan().tolist() == [True, False, False, False]
        grads = twin.backward(
            torch.ones_like(loss), torch.zeros_like(loss), input, linear_weight, target, lse, terms, True, True
        )
        assert grads[0].isnan().any(dim=1).tolist() == [True, False, False, False] and grads[1].isnan().all()
        if INTERPRETED:
            with pytest.raises(ValueError, match=f"target {wrong} must lie in 0..4"):
                fused(input, linear_weight, target, reduction=reduction)


@pytest.mark.parametrize("tokens", [0, 4])
def test_the_mean_over_no_token_is_nan_with_gradients_of_zero(tokens: int) -> None:
    input, linear_weight, target = make(tokens, 3, 5, torch.float32)
    op = of(fused, target.fill_(-100), **ALL_TERMS)
    loss, *grads = results(op, (input, linear_weight), torch.ones((), device=DEVICE))
    assert loss.isnan() and not any(grad.any() for grad in grads)


def test_what_an_ignored_token_holds_does_not_reach_the_gradients() -> None:
    input, linear_weight, target = make(9, 4, 6, torch.float16)
    grad = torch.ones((), device=DEVICE)
    before = results(of(fused, target, **ALL_TERMS), (input, linear_weight), grad)
    for number in (torch.nan, 6e4):
        input[target == -100] = number
        after = results(of(fused, target, **ALL_TERMS), (input, linear_weight), grad)
        assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


def test_makes_only_the_gradients_that_are_asked_for() -> None:
    input, linear_weight, target = make(5, 3, 6, torch.float32)
    both = results(of(fused, target), (input, linear_weight), torch.ones((), device=DEVICE))
    leaf = input.clone().requires_grad_()
    fused(leaf, linear_weight, target).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, both[1])
    leaf = linear_weight.clone().requires_grad_()
    fused(input, leaf, target).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, both[2])


def test_takes_any_strides() -> None:
    input, linear_weight, target = make(10, 8, 12, torch.float32)
    views = input.T[:5].T[::2], linear_weight[::2, :5], target[::2].clamp(max=5)
    op, definition = (of(form, views[2], reduction="none") for form in (fused, reference))
    assert_obeys_rule(op, definition, views[:2])


def test_ops_are_registered_correctly() -> None:
    input, linear_weight, target = make(4, 4, 5, torch.float32)
    ops, terms = torch.ops.workbench_kernels, (-100, 0.1)
    inputs = (input.requires_grad_(), linear_weight.requires_grad_(), target, *terms, True)
    torch.library.opcheck(ops.linear_cross_entropy.default, inputs)
    loss, lse = (x.detach() for x in ops.linear_cross_entropy(*inputs))
    saved = (loss, lse, input.detach(), linear_weight.detach(), target, lse)
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.linear_cross_entropy_grad.default, (*saved, *terms, *asked, True))


def test_compiles_as_one_graph() -> None:
    input, linear_weight, target = make(4, 4, 5, torch.float32)
    op = of(fused, target, **ALL_TERMS)
    grad = torch.ones((), device=DEVICE)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    ours, theirs = (results(form, (input, linear_weight), grad) for form in (compiled, op))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        *([(torch.bfloat16, "rounds bfloat16 wrongly")] if INTERPRETED else []),
        (torch.float64, "takes float32, float16 or bfloat16"),
    ],
)
def test_refuses(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(*make(2, 3, 4, dtype))
