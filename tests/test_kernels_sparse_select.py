"""sparse_select on the CPU: the rule, choices by hand, ties, what is no number, what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_rules import ODD_SIZES, Op, assert_obeys_rule, results
from torch import Tensor

from workbench_kernels import sparse_select
from workbench_kernels.causal_attention import visible
from workbench_kernels.sparse_select import MAX_KEYS, fits_twin, select, select_last
from workbench_kernels.tier import resolve

definition = partial(sparse_select, impl="reference")
TIERS = [sparse_select, definition]


def make(
    queries: int, keys: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 8, width: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key = torch.randn(batch, queries, heads, width), torch.randn(batch, keys, width)
    weight = torch.randn(batch, queries, heads, dtype=torch.promote_types(dtype, torch.float32))
    return query.to(dtype), key.to(dtype), weight


def inputs_for(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What gives exactly these finite scores [B, T, S]: key s reads number s, and the second head's weight is -1."""
    key = torch.eye(scores.shape[2]).expand(len(scores), -1, -1)
    weight = torch.tensor([1.0, -1.0]).expand(*scores.shape[:2], 2)
    return torch.stack((scores, -scores), dim=2).relu(), key, weight


def scores_of(op, index_topk: int = 3) -> Op:
    return lambda *inputs: op(*inputs, index_topk=index_topk).scores


def chosen(scores: Tensor, index_topk: int) -> Tensor:
    """What the definition chooses by these scores."""
    return select(scores, visible(scores.shape[1], scores.shape[2], scores.device), index_topk=index_topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [*((n, n) for n in ODD_SIZES), (1, 60), (60, 300), (0, 3), (0, 0)])
@pytest.mark.parametrize(("heads", "width"), [(8, 5), (1, 1), (3, 64)])
def test_obeys_the_rule(queries: int, keys: int, heads: int, width: int, dtype: torch.dtype) -> None:
    inputs = make(queries, keys, dtype, heads=heads, width=width)
    assert_obeys_rule(scores_of(sparse_select), scores_of(definition), inputs)


def test_no_sequences() -> None:
    found = sparse_select(*make(3, 4, torch.float32, batch=0), index_topk=2)
    assert found.scores.shape == (0, 3, 4) and found.keys.shape == (0, 3, 2)


def test_scores_by_hand() -> None:
    query = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    key = torch.tensor([[[3.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]])
    weight = torch.tensor([[[1.0, -0.5]]])
    # Products of head 0: 3, -1, -1; of head 1: 2, 2, -2. What is below 0 counts as 0.
    for op in TIERS:
        found = op(query, key, weight, index_topk=2)
        assert found.scores.tolist() == [[[3 - 1, -1, 0]]] and found.keys.tolist() == [[[0, 2]]]


def test_a_choice_by_hand() -> None:
    scores = torch.tensor([[[9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 9.0, 9.0], [1.0, 3.0, 3.0, 9.0], [2.0, 1.0, 2.0, 2.0]]])
    for op in TIERS:
        found = op(*inputs_for(scores), index_topk=2)
        assert torch.equal(found.scores, scores)
        assert found.keys.tolist() == [[[0, -1], [1, 0], [1, 2], [0, 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index_topk", [1, 4, 60, 1000])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (37, 37), (5, 60), (2, 700)])
def test_the_best_visible_keys_and_of_equals_the_lowest(
    queries: int, keys: int, index_topk: int, dtype: torch.dtype
) -> None:
    scores = torch.randint(-2, 3, (2, queries, keys), generator=torch.Generator().manual_seed(keys)).float()
    found = sparse_select(*(x.to(dtype) for x in inputs_for(scores)), index_topk=index_topk)
    assert torch.equal(found.scores, scores.to(dtype))
    assert found.keys.dtype == torch.int64 and found.keys.shape == (2, queries, min(index_topk, keys))
    for b in range(2):
        for t in range(queries):
            seen, row = keys - queries + t + 1, scores[b, t].tolist()
            expected = sorted(range(seen), key=lambda s, row=row: (-row[s], s))[:index_topk]
            assert found.keys[b, t].tolist() == expected + [-1] * (found.keys.shape[2] - len(expected))


def test_where_every_product_is_negative_the_first_keys_are_chosen() -> None:
    query, key, weight = make(9, 12, torch.float32)
    for op in TIERS:
        found = op(query.abs(), -key.abs(), weight, index_topk=4)
        assert not found.scores.any(), "weights below 0 make -0.0"
        assert torch.equal(found.keys, torch.arange(4).expand(2, 9, 4))


@pytest.mark.parametrize("index_topk", [1, 7, 60, 200])
def test_the_fast_choice_is_that_of_the_definition(index_topk: int) -> None:
    """Both zeros, both infinities, subnormal numbers, and what is no number, of either sign."""
    torch.manual_seed(0)
    tiny = torch.finfo(torch.float32).smallest_normal / 4
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, tiny, -tiny, torch.inf, -torch.inf, torch.nan, -torch.nan])
    scores = values[torch.randint(len(values), (3, 60, 129))]
    scores[0] = torch.randn(60, 129)
    assert torch.equal(select_last(scores, index_topk), chosen(scores, index_topk))


def test_what_is_no_number_counts_as_the_highest() -> None:
    query, key, weight = torch.ones(1, 3, 1, 1), torch.tensor([[[1.0], [torch.nan], [torch.inf]]]), torch.ones(1, 3, 1)
    for op in TIERS:
        assert op(query, key, weight, index_topk=2).keys.tolist() == [[[0, -1], [1, 0], [1, 2]]]


@pytest.mark.parametrize("op", TIERS)
def test_keys_to_come_touch_no_earlier_query(op) -> None:
    query, key, weight = make(60, 70, torch.float32)
    before = op(query, key, weight, index_topk=8)
    key[:, 40:] = torch.nan
    after = op(query, key, weight, index_topk=8)
    # The queries stand at positions 10 to 69.
    assert torch.equal(before.keys[:, :30], after.keys[:, :30])
    assert torch.equal(before.scores[..., :40], after.scores[..., :40])
    assert (after.keys[:, 30, 0] == 40).all(), "which is no number, and seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_and_without_gradients_the_choice_is_one(dtype: torch.dtype) -> None:
    inputs = make(60, 300, dtype)
    alone = sparse_select(*inputs, index_topk=60)
    recorded = sparse_select(*(x.requires_grad_() for x in inputs), index_topk=60)
    assert torch.equal(alone.scores, recorded.scores) and torch.equal(alone.keys, recorded.keys)
    assert torch.equal(recorded.keys, chosen(recorded.scores, 60))
    assert recorded.scores.requires_grad and not recorded.keys.requires_grad
    assert alone.scores.dtype == torch.promote_types(dtype, torch.float32)


def test_views_are_read_as_they_lie() -> None:
    query, key, weight = make(9, 9, torch.float32)
    views = query.transpose(1, 2)[..., 1:4], key[:, :8, 2:], weight.transpose(1, 2)
    grad = torch.randn(2, 8, 1).expand(2, 8, 8)
    found, expected = (
        results(scores_of(op), inputs, grad)
        for op, inputs in ((sparse_select, views), (definition, [x.contiguous() for x in views]))
    )
    torch.testing.assert_close(found, expected)


def test_gradients_by_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in make(4, 6, torch.float64, heads=3)]
    products = torch.einsum("bthk,bsk->bths", inputs[0], inputs[1])
    assert products.abs().min() > 1e-4, "at 0 there is a bend"
    assert torch.autograd.gradcheck(scores_of(sparse_select), inputs)


def test_no_gradient_is_made_where_none_arrives() -> None:
    query, key, weight = (x.requires_grad_() for x in make(4, 6, torch.float32))
    (sparse_select(query, key, weight, index_topk=2).keys.sum() + query.sum()).backward()
    assert query.grad is not None and key.grad is None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_op_is_registered_correctly(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in make(4, 6, dtype)]
    torch.library.opcheck(torch.ops.workbench_kernels.sparse_select.default, (*inputs, 3, False))
    query, key, weight = make(3, 9, dtype)
    views = query.transpose(1, 2).requires_grad_(), key, weight.transpose(1, 2)
    torch.library.opcheck(torch.ops.workbench_kernels.sparse_select.default, (*views, 3, False))
    grad = torch.randn(2, 4, 6, dtype=inputs[2].dtype)
    backward = torch.ops.workbench_kernels.sparse_select_grad.default
    torch.library.opcheck(backward, (grad, *(x.detach() for x in inputs), False))


def test_compiles_as_one_graph() -> None:
    inputs = make(4, 6, torch.float32)
    grad = torch.randn(2, 4, 6)
    compiled = torch.compile(scores_of(sparse_select), backend="aot_eager", fullgraph=True)
    expected = results(scores_of(sparse_select), inputs, grad)
    torch.testing.assert_close(results(compiled, inputs, grad), expected, rtol=0, atol=0)
    choose = torch.compile(partial(sparse_select, index_topk=3), backend="aot_eager", fullgraph=True)
    assert torch.equal(choose(*inputs).keys, sparse_select(*inputs, index_topk=3).keys)


QUERY, KEY, WEIGHT = torch.ones(2, 3, 4, 5), torch.ones(2, 6, 5), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": QUERY[0]}, r"must be \[B, T, H, K\], \[B, S, K\] and \[B, T, H\]"),
        ({"key": QUERY}, r"must be \[B, T, H, K\], \[B, S, K\] and \[B, T, H\]"),
        ({"key": KEY[..., :4]}, r"must be \[B, T, H, K\], \[B, S, K\] and \[B, T, H\]"),
        ({"key": KEY[:1]}, r"must be \[B, T, H, K\], \[B, S, K\] and \[B, T, H\]"),
        ({"weight": WEIGHT[:, :2]}, r"must be \[B, T, H, K\], \[B, S, K\] and \[B, T, H\]"),
        ({"query": QUERY[:, :, :0], "weight": WEIGHT[:, :, :0]}, "with H > 0 and K > 0"),
        ({"key": KEY[:, :2]}, "3 queries are more than 2 keys"),
        ({"query": QUERY.long(), "key": KEY.long()}, "one floating dtype"),
        ({"key": KEY.double()}, "one floating dtype"),
        ({"weight": WEIGHT.bfloat16()}, r"weight \(torch.bfloat16\) must be torch.float32"),
        ({"query": QUERY.double(), "key": KEY.double()}, r"weight \(torch.float32\) must be torch.float64"),
        ({"index_topk": 0}, "index_topk=0 must be at least 1"),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_select(**{"query": QUERY, "key": KEY, "weight": WEIGHT, "index_topk": 2, **change})


def test_auto_on_a_gpu_takes_the_definition_of_what_has_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    for width, keys, tier in ((128, MAX_KEYS, "fused"), (129, 1, "reference"), (128, MAX_KEYS + 1, "reference")):
        fits = fits_twin(width, keys)
        assert resolve("sparse_select", "auto", torch.device("cuda"), torch.bfloat16, fits=fits) == tier
