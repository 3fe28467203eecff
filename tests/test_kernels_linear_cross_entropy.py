"""linear_cross_entropy on the CPU: the rule in all its forms, cases by hand, memory, what it refuses."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_rules import ODD_SIZES, assert_obeys_rule, most_bytes, results
from torch import Tensor

from workbench_kernels import linear_cross_entropy
from workbench_kernels.linear_cross_entropy import LossAndLse, Terms, backward, chunks, forward

OP = importlib.import_module("workbench_kernels.linear_cross_entropy")  # the module: the package's name is the function
reference = partial(linear_cross_entropy, impl="reference")
REDUCTIONS = ["mean", "sum", "none"]
TERMS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"label_smoothing": 0.3, "z_loss": 0.02, "ignore_index": 3},
    {"label_smoothing": 1.0},
]


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every third token is ignored by the default index, and some have the token 3."""
    torch.manual_seed(0)
    target = torch.randint(vocabulary, (tokens,))
    target[2::3] = -100
    target[1::7] = min(3, vocabulary - 1)
    return torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype), target


def of(op: Callable[..., Tensor], target: Tensor, **options) -> Callable[..., Tensor]:
    return lambda input, linear_weight: op(input, linear_weight, target, **options)


def without_the_default(target: Tensor, options: dict) -> Tensor:
    return target.clamp(min=0) if "ignore_index" in options else target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", TERMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_obeys_the_rule(reduction: str, options: dict, dtype: torch.dtype) -> None:
    input, linear_weight, target = make(60, 24, 129, dtype)
    options = {"reduction": reduction, **options}
    target = without_the_default(target, options)
    assert_obeys_rule(
        of(linear_cross_entropy, target, **options), of(reference, target, **options), (input, linear_weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", ODD_SIZES)
@pytest.mark.parametrize("width", [0, *ODD_SIZES])
@pytest.mark.parametrize("tokens", [0, *ODD_SIZES])
def test_obeys_the_rule_at_any_size(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    input, linear_weight, target = make(tokens, width, vocabulary, dtype)
    options = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01}
    assert_obeys_rule(
        of(linear_cross_entropy, target, **options), of(reference, target, **options), (input, linear_weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 30])
def test_chunks_make_no_difference(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "_CHUNK_ROWS", rows)
    test_obeys_the_rule("mean", TERMS[3], dtype)
    test_obeys_the_rule("none", TERMS[2], dtype)


def test_the_gradient_of_a_16_bit_weight_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sum of bfloat16 one large contribution would swallow 512 small ones."""
    monkeypatch.setattr(OP, "_CHUNK_ROWS", 1)
    input = torch.full((513, 1), 1.0 / 1024, dtype=torch.bfloat16)
    input[0] = 1.0
    linear_weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(input, linear_weight, torch.zeros(513, dtype=torch.int64), reduction="sum").backward()
    assert linear_weight.grad is not None
    assert linear_weight.grad.flatten().tolist() == [-0.75, 0.75]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_agrees_with_torch(reduction: str, smoothing: float, impl: str) -> None:
    input, linear_weight, target = make(20, 5, 11, torch.float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def torch_loss(input: Tensor, linear_weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target, **options)

    grad = torch.randn(20 if reduction == "none" else (), dtype=torch.float64)
    ours = results(of(linear_cross_entropy, target, impl=impl, **options), (input, linear_weight), grad)
    torch.testing.assert_close(ours, results(torch_loss, (input, linear_weight), grad))


def test_a_case_by_hand() -> None:
    """Logits 0 and ln 3: probabilities 1/4 and 3/4, and a logarithm of the sum of exponentials of ln 4."""
    input, linear_weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)]])
    target = torch.tensor([0, 1])
    plain = linear_cross_entropy(input, linear_weight, target, reduction="none")
    torch.testing.assert_close(plain, torch.tensor([math.log(4), math.log(4 / 3)]))
    z_loss = linear_cross_entropy(input, linear_weight, target, reduction="none", z_loss=0.5)
    torch.testing.assert_close(z_loss - plain, torch.full((2,), 0.5 * math.log(4) ** 2))
    both = linear_cross_entropy(input, linear_weight, torch.tensor([0, -100]), reduction="none", return_lse=True)
    torch.testing.assert_close(torch.stack(both), torch.tensor([[math.log(4), 0.0], [math.log(4), 0.0]]))
    smoothed = linear_cross_entropy(input, linear_weight, target, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.1 * (math.log(4) + math.log(4 / 3)))


def test_large_logits_cost_no_digits() -> None:
    """An offset of all logits changes nothing; in float32 their logsumexp alone would be wrong by up to 0.002."""
    input, linear_weight = torch.ones(1, 1), torch.tensor([[60_000.0], [60_001.0]])
    op = of(linear_cross_entropy, torch.tensor([0]))
    loss, _, grad = results(op, (input, linear_weight), torch.tensor(1.0))
    torch.testing.assert_close(loss.item(), math.log1p(math.e), rtol=1e-6, atol=0)
    share = math.e / (1 + math.e)
    torch.testing.assert_close(grad.flatten().tolist(), [-share, share], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", TERMS[:3])
@pytest.mark.parametrize("tokens", [0, 4])
def test_the_mean_over_no_token_is_nan_with_gradients_of_zero(tokens: int, options: dict, impl: str) -> None:
    input, linear_weight, _ = make(tokens, 3, 5, torch.float32)
    target = torch.full((tokens,), -100)
    assert F.cross_entropy(input @ linear_weight.T, target).isnan()
    loss, *grads = results(
        of(linear_cross_entropy, target, impl=impl, **options), (input, linear_weight), torch.tensor(1.0)
    )
    assert loss.isnan() and not any(grad.any() for grad in grads)
    for reduction in ("sum", "none"):
        assert not linear_cross_entropy(input, linear_weight, target, reduction=reduction, impl=impl, **options).any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_an_ignored_token_holds_does_not_reach_the_loss(impl: str) -> None:
    input, linear_weight, target = make(9, 4, 6, torch.float32)
    op = of(linear_cross_entropy, target, impl=impl, z_loss=0.1, label_smoothing=0.1)
    before = op(input, linear_weight)
    input[target == -100] = torch.nan
    assert torch.equal(op(input, linear_weight), before)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 6e4])
def test_what_an_ignored_token_holds_does_not_reach_the_gradients(number: float) -> None:
    """Where the definition's are NaN: its products of zero and what is no number."""
    input, linear_weight, target = make(9, 4, 6, torch.float16)
    op = of(linear_cross_entropy, target, z_loss=0.1, label_smoothing=0.1)
    before = results(op, (input, linear_weight), torch.tensor(1.0))
    input[target == -100] = number
    for now, then in zip(results(op, (input, linear_weight), torch.tensor(1.0)), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("options", TERMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_by_finite_differences(reduction: str, options: dict) -> None:
    input, linear_weight, target = make(7, 3, 5, torch.float64)
    target = without_the_default(target, options)
    op = of(linear_cross_entropy, target, reduction=reduction, **options)
    assert torch.autograd.gradcheck(op, (input.requires_grad_(), linear_weight.requires_grad_()))


def of_lse(op: Callable[..., LossAndLse], target: Tensor, **options) -> Callable[..., Tensor]:
    return lambda input, linear_weight: op(input, linear_weight, target, return_lse=True, **options).lse


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_logarithm_of_the_sums_has_gradients_too(impl: str) -> None:
    input, linear_weight, target = make(7, 3, 5, torch.float64)
    leaves = input.requires_grad_(), linear_weight.requires_grad_()
    assert torch.autograd.gradcheck(of_lse(linear_cross_entropy, target, impl=impl), leaves)
    loss, lse = linear_cross_entropy(*leaves, target, return_lse=True, z_loss=0.25, impl=impl)
    plain = linear_cross_entropy(*leaves, target, impl=impl) + 0.25 * lse.square().sum() / (target != -100).sum()
    torch.testing.assert_close(loss, plain)
    ours = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_logarithm_of_the_sums_obeys_the_rule(dtype: torch.dtype) -> None:
    input, linear_weight, target = make(60, 24, 129, dtype)
    assert_obeys_rule(of_lse(linear_cross_entropy, target), of_lse(reference, target), (input, linear_weight))


def test_makes_only_the_gradients_that_are_asked_for() -> None:
    input, linear_weight, target = make(7, 3, 5, torch.float64)
    both = torch.autograd.grad(
        linear_cross_entropy(input.requires_grad_(), linear_weight.requires_grad_(), target), (input, linear_weight)
    )
    alone = torch.autograd.grad(linear_cross_entropy(input, linear_weight.detach(), target), input)
    torch.testing.assert_close(alone, both[:1], rtol=0, atol=0)
    alone = torch.autograd.grad(linear_cross_entropy(input.detach(), linear_weight, target), linear_weight)
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=0)


def test_takes_any_strides() -> None:
    input, linear_weight, target = make(10, 8, 12, torch.float32)
    views = input.T[:5].T[::2], linear_weight[::2, :5], target[::2].clamp(max=5)
    grad = torch.randn(5)
    op = of(linear_cross_entropy, views[2], reduction="none")
    theirs = results(of(reference, views[2], reduction="none"), views[:2], grad)
    torch.testing.assert_close(results(op, views[:2], grad), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_are_registered_correctly(dtype: torch.dtype) -> None:
    input, linear_weight, target = make(6, 4, 5, dtype)
    ops, terms = torch.ops.workbench_kernels, (-100, 0.1)
    inputs = (input.requires_grad_(), linear_weight.requires_grad_(), target, *terms, False)
    torch.library.opcheck(ops.linear_cross_entropy.default, inputs)
    loss, lse = (x.detach() for x in ops.linear_cross_entropy(*inputs))
    for asked in ((True, True), (True, False), (False, True)):
        saved = (loss, lse, input.detach(), linear_weight.detach(), target, lse)
        torch.library.opcheck(ops.linear_cross_entropy_grad.default, (*saved, *terms, *asked, False))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_as_one_graph(reduction: str) -> None:
    input, linear_weight, target = make(6, 4, 5, torch.float32)
    op = of(linear_cross_entropy, target, reduction=reduction, z_loss=0.01)
    grad = torch.randn(6 if reduction == "none" else ())
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    ours, theirs = (results(form, (input, linear_weight), grad) for form in (compiled, op))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(16_384, 4096, 131_072), (4096, 512, 1_000_003)])
def test_never_holds_the_logits(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    """By tensors without storage, of sizes that a CPU would not bear: 8 GiB of logits or more in the definition."""
    input = torch.empty(tokens, width, dtype=dtype, device="meta")
    linear_weight = torch.empty(vocabulary, width, dtype=dtype, device="meta")
    target = torch.empty(tokens, dtype=torch.int64, device="meta")
    loss, lse = (torch.empty(tokens, dtype=wide, device="meta") for wide in (torch.float32, torch.float64))
    terms = Terms(-100, 0.1)
    small = 16 * 2**20  # numbers of every token, and the tokens of a chunk in float32
    assert most_bytes(partial(forward, input, linear_weight, target, terms)) <= OP.WORKSPACE_BYTES + small
    made = partial(backward, loss, lse, input, linear_weight, target, terms, True, True)
    gradients = input.nbytes + 4 * linear_weight.numel() + (linear_weight.nbytes if dtype != torch.float32 else 0)
    assert most_bytes(made) <= gradients + OP.WORKSPACE_BYTES + small
    assert most_bytes(partial(reference, input, linear_weight, target)) > 2**33


def test_the_measure_of_memory_sees_what_is_held_and_what_is_not() -> None:
    """A chunk of 256 tokens of 1000 logits, whatever the number of tokens; the definition holds all, more than once."""
    input, linear_weight, target = make(2048, 4, 1000, torch.float32)
    ours = most_bytes(partial(forward, input, linear_weight, target, Terms(-100, 0.0)))
    assert 256 * 1000 * 4 <= ours <= 256 * 1000 * 4 + 2048 * 64
    assert most_bytes(partial(reference, input, linear_weight, target)) >= 2 * 2048 * 1000 * 4


def test_chunks_cover_every_token_once() -> None:
    for tokens, row_bytes, most in ((0, 4, None), (1, 4, None), (1000, 2**20, None), (1000, 2**30, None), (777, 8, 60)):
        pieces = chunks(tokens, row_bytes, most)
        assert [row for rows in pieces for row in range(rows.start, rows.stop)] == list(range(tokens))
        assert all((x.stop - x.start) * row_bytes <= max(row_bytes, OP.WORKSPACE_BYTES) for x in pieces)
    assert chunks(5000, 2 * 128_256)[0] == slice(0, 2048)


INPUT, WEIGHT, TARGET = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 3, -100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(1, 3, 2)}, r"input \[1, 3, 2\] must be \[N, K\]"),
        ({"linear_weight": torch.ones(4, 3)}, r"linear_weight \[4, 3\] \[V, K\]"),
        ({"linear_weight": torch.ones(0, 2)}, "at least one"),
        ({"linear_weight": WEIGHT.double()}, "must have one floating dtype"),
        ({"target": TARGET.int()}, r"target \(torch.int32 \[3\]\) must be int64 \[N\] with N = 3"),
        ({"target": TARGET[:2]}, r"target \(torch.int64 \[2\]\) must be int64 \[N\] with N = 3"),
        ({"reduction": "max"}, "reduction='max' must be 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must lie in 0..1"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must be at least 0"),
        ({"z_loss": math.nan}, "z_loss=nan must be at least 0"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        linear_cross_entropy(**{"input": INPUT, "linear_weight": WEIGHT, "target": TARGET, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("target", "ignore_index", "message"),
    [
        (torch.tensor([0, 4, -100]), -100, r"target 4 must lie in 0..3 or be ignore_index \(-100\)"),
        (torch.tensor([0, -1, -100]), -100, r"target -1 must lie in 0..3 or be ignore_index \(-100\)"),
        (TARGET, -1, r"target -100 must lie in 0..3 or be ignore_index \(-1\)"),
    ],
)
def test_refuses_targets_out_of_range(
    target: Tensor, ignore_index: int, message: str, recorded: bool, impl: str
) -> None:
    input = INPUT.clone().requires_grad_(recorded)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(input, WEIGHT, target, ignore_index=ignore_index, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_target_without_probability_spoils_no_sum(impl: str) -> None:
    states = torch.full((2, 4), 200.0, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[-200.0] * 4, [1.0] * 4, [0.0] * 4], dtype=torch.float16)  # the first logit is -inf
    found = linear_cross_entropy(states, weight, torch.tensor([0, 1]), reduction="none", return_lse=True, impl=impl)
    assert found.lse.tolist() == [800, 800]
    found.lse[0].backward()
    assert states.grad is not None and states.grad.tolist() == [[1.0] * 4, [0.0] * 4]
