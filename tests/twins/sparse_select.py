"""The Triton twin of sparse_select; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, Op, assert_obeys_rule, results
from torch import Tensor

from workbench_kernels import sparse_select
from workbench_kernels.causal_attention import visible
from workbench_kernels.fused import sparse_select as fused_sparse_select
from workbench_kernels.sparse_select import reference, select

# B, T, S, H, K.
SIZES = [(0, 2, 3, 1, 4), (2, 0, 3, 2, 4), (1, 1, 1, 1, 1), (2, 1, 60, 3, 60), (1, 60, 129, 2, 64), (2, 17, 17, 2, 128)]
SIZES += [] if INTERPRETED else [(2, 1024, 4096, 64, 128)]
MUTATIONS = [
    Mutation("sparse_select_fwd_kernel", "tl.where(product < 0, 0.0, product)", "product"),
    Mutation("sparse_select_fwd_kernel", "at = row * num_heads", "at = row"),
    Mutation("sparse_select_fwd_kernel", "(sequence * num_keys + first_key) * K", "(sequence * num_keys) * K"),
    Mutation("sparse_select_bwd_query_kernel", "tl.where(product <= 0, 0.0, grad)", "grad"),
    Mutation("sparse_select_bwd_query_kernel", "grad_query * weight[:, None]", "grad_query"),
    Mutation("sparse_select_bwd_query_kernel", "tl.sum(passed * product", "tl.sum(passed * passed"),
    Mutation("sparse_select_bwd_key_kernel", "grad * weight[None, :]", "grad"),
    Mutation("sparse_select_bwd_key_kernel", "tl.where(product <= 0", "tl.where(product > 0"),
    Mutation("sparse_select_bwd_key_kernel", "part * blocks_per_part + block", "block"),
    Mutation("sparse_select_topk_kernel", "(row % num_queries).to(tl.int32) + 1", "(row % num_queries).to(tl.int32)"),
    Mutation("sparse_select_topk_kernel", "tl.where(bins > found", "tl.where(bins >= found"),
    Mutation("sparse_select_topk_kernel", "is_equal, axis=0) <= equals", "is_equal, axis=0) < equals"),
    Mutation("sparse_select_topk_kernel", "is_key & ((ordered & settled)", "((ordered & settled)"),
    Mutation("in_order", "bits == 0x80000000, 0", "bits == 0x80000000, 0x80000000"),
]


def make(
    batch: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key = torch.randn(batch, queries, heads, width), torch.randn(batch, keys, width)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), torch.randn(batch, queries, heads).to(DEVICE)


def scores_of(op) -> Op:
    """The scores alone; all keys are chosen, which takes the interpreter the least time."""
    return lambda *inputs: op(*inputs, index_topk=10_000).scores


fused = partial(sparse_select, impl="fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_obeys_the_rule(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = make(*sizes, dtype)
    assert_obeys_rule(scores_of(fused), scores_of(reference), inputs)


def test_sums_several_blocks_per_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks of keys and two parts of two blocks of queries, of which the last is not there."""
    monkeypatch.setattr(fused_sparse_select, "PROGRAMS", 10)
    assert_obeys_rule(scores_of(fused), scores_of(reference), make(1, 67, 67, 2, 8))


def edge_scores(queries: int, keys: int) -> Tensor:
    """Few different numbers, so that most have equals; both zeros, both infinities and what is no number."""
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (2, queries, keys)).float()
    scores[0, 0] = torch.randn(keys)
    scores[0, 1:] *= torch.randint(0, 2, (queries - 1, keys)) * 2 - 1
    for value in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        scores[1].masked_fill_(torch.rand(queries, keys) < 0.05, value)
    scores[1, 1] = -torch.inf
    return scores.to(DEVICE)


def assert_chooses(scores: Tensor, index_topk: int) -> None:
    """The twin chooses by these scores what the definition does."""
    from workbench_kernels.fused import sparse_select as twin  # here: a mutation replaces it

    seen = visible(scores.shape[1], scores.shape[2], scores.device)
    assert torch.equal(twin.choose(scores, index_topk), select(scores, seen, index_topk=index_topk))


@pytest.mark.parametrize("index_topk", [1, 60, 300])
def test_chooses_as_the_definition_does(index_topk: int) -> None:
    assert_chooses(edge_scores(5, 129), index_topk)
    assert_chooses(torch.zeros(1, 3, 129, device=DEVICE), index_topk)


def test_chooses_among_several_blocks_of_a_row() -> None:
    """Rows longer than a block, with a query's own key at the beginning of one, and equals in all."""
    assert_chooses(edge_scores(2, 2 * fused_sparse_select.ROW_BLOCK + 1), 700)


def test_few_long_rows_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which chooses the same keys."""
    inputs = make(1, 3, 40, 2, 8)
    expected = fused(*inputs, index_topk=30).keys
    monkeypatch.setattr(fused_sparse_select, "LONG_ROW", 39)
    monkeypatch.setattr(fused_sparse_select, "sparse_select_topk_kernel", None)
    assert torch.equal(fused(*inputs, index_topk=30).keys, expected)


def test_keys_to_come_do_not_touch_the_choice() -> None:
    query, key, weight = make(2, 9, 12, 2, 8)
    before = fused(query, key, weight, index_topk=4)
    key[:, 8:] = torch.nan
    after = fused(query, key, weight, index_topk=4)
    assert torch.equal(before.keys[:, :5], after.keys[:, :5])
    assert torch.equal(before.scores[..., :8], after.scores[..., :8]) and after.scores[..., 8:].isnan().all()
    assert after.keys[:, 8, :4].tolist() == [[8, 9, 10, 11]] * 2


def test_takes_strides() -> None:
    query, key, weight = make(3, 4, 9, 5, 12)
    inputs = query.transpose(1, 2)[..., 1:9], key[:, ::2, 2:10][:, :5], weight.transpose(1, 2)
    contiguous = [x.contiguous() for x in inputs]
    grad = torch.ones(1, device=DEVICE).expand(3, 5, 5)
    found, expected = (results(scores_of(fused), x, grad) for x in (inputs, contiguous))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    def proof() -> None:
        if mutation.kernel in ("in_order", "sparse_select_topk_kernel"):
            test_chooses_as_the_definition_does(60)
            test_chooses_as_the_definition_does(300)
        else:
            assert_obeys_rule(scores_of(fused), scores_of(reference), make(1, 35, 67, 2, 8))

    assert_seen("sparse_select", mutation, tmp_path, proof)


def test_op_is_registered_correctly() -> None:
    inputs = [tensor.requires_grad_() for tensor in make(2, 3, 5, 2, 8)]
    torch.library.opcheck(torch.ops.workbench_kernels.sparse_select.default, (*inputs, 2, True))


def test_compiles_as_one_graph() -> None:
    inputs = make(1, 3, 5, 2, 8)
    grad = torch.randn(1, 3, 5, device=DEVICE)
    compiled = torch.compile(scores_of(fused), backend="aot_eager", fullgraph=True)
    expected = results(scores_of(fused), inputs, grad)
    torch.testing.assert_close(results(compiled, inputs, grad), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        *([(torch.bfloat16, 4, "rounds bfloat16 wrongly")] if INTERPRETED else []),
        (torch.float64, 4, "takes float32, float16 or bfloat16"),
        (torch.float32, 129, "heads of up to 128 numbers"),
    ],
)
def test_refuses(dtype: torch.dtype, width: int, message: str) -> None:
    query, key, weight = make(1, 2, 3, 2, width, dtype)
    with pytest.raises(ValueError, match=message):
        fused(query, key, weight.to(torch.promote_types(dtype, torch.float32)), index_topk=1)
