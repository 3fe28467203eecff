"""Which keys a query shall read: the scores of a lightning indexer, and the keys that score highest.

Letters: B sequences, T queries, S keys, H index heads, K their width, Y chosen keys, N = B * T rows of scores,
X = T * H rows of products.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.causal_attention import visible
from workbench_kernels.moe_route import best
from workbench_kernels.tier import check_devices, resolve, unwatched

MAX_WIDTH = 128  # the twin keeps a head's numbers in one tile
MAX_KEYS = 2**24  # the twin counts the scores within a tile in 32 bits
_BLOCK_PRODUCTS = 2**18  # of all heads with all keys: what a core's cache holds


class SparseSelection(NamedTuple):
    """The scores of all keys, and the keys to read."""

    scores: Tensor
    keys: Tensor


def fits_twin(width: int, num_keys: int) -> bool:
    """Whether the Triton twin takes heads of `width` numbers and this many keys."""
    return width <= MAX_WIDTH and num_keys <= MAX_KEYS


def sparse_select(
    query: Tensor, key: Tensor, weight: Tensor, *, index_topk: int, impl: str = "auto"
) -> SparseSelection:
    """The sum over heads of `weight * relu(query . key)` for every key, and the visible keys that score highest.

    The T queries are the last of the S positions, and no query sees the keys after its own. Ties are no rarity: where
    every head's product is negative, a score is exactly 0. Of equals, as which 0.0 and -0.0 count, the lowest index is
    chosen. A score that is no number counts as the highest of all, as it does for `torch.sort`. Gradients of the scores
    reach query, key and weight; the choice passes none.

    Args:
        query: [B, T, H, K].
        key: [B, S, K] with S >= T, of the dtype of `query`; all heads share it.
        weight: [B, T, H], scaled already, of either sign: float32, or float64 with a float64 `query`.
        index_topk: how many keys to choose, at least 1.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        Scores [B, T, S] of all keys, later ones too, in the dtype of `weight`; keys [B, T, min(index_topk, S)], int64,
        the best first, and -1 in the places left where a query sees fewer.

    Raises:
        ValueError: shapes or dtypes do not fit, or `index_topk` is below 1.

    Source: DeepSeek-V3.2-Exp report, section 1, equation 1.
    """
    _check(query, key, weight, index_topk)
    fits = fits_twin(query.shape[-1], key.shape[1])
    tier = resolve("sparse_select", impl, query.device, query.dtype, fits=fits)
    if tier == "reference":
        return reference(query, key, weight, index_topk=index_topk)
    if tier == "torch" and unwatched(query, key, weight):
        return SparseSelection(*forward(query, key, weight, index_topk))
    return SparseSelection(*_sparse_select(query, key, weight, index_topk, tier == "fused"))


def reference(query: Tensor, key: Tensor, weight: Tensor, *, index_topk: int) -> SparseSelection:
    """The definition; autograd differentiates the scores."""
    scores_BTS = index_scores(query, key, weight)
    seen_TS = visible(query.shape[1], key.shape[1], query.device)
    return SparseSelection(scores_BTS, select(scores_BTS, seen_TS, index_topk=index_topk))


def index_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """[B, T, S], the sum over heads of weight * relu(query . key)."""
    matches_BHTS = torch.einsum("bthk,bsk->bhts", query.to(weight.dtype), key.to(weight.dtype)).relu()
    return torch.einsum("bhts,bth->bts", matches_BHTS, weight)


def select(scores: Tensor, seen: Tensor, *, index_topk: int) -> Tensor:
    """[B, T, Y], the keys that score highest of those that are `seen`, [T, S], by each query; -1 in places left."""
    _check_count(index_topk)
    hidden_as_last_BTS = scores.masked_fill(~seen, -torch.inf)
    keys_BTY = best(hidden_as_last_BTS, index_topk)
    places_Y = torch.arange(keys_BTY.shape[-1], device=scores.device)
    return keys_BTY.masked_fill(places_Y >= seen.sum(-1, keepdim=True), -1)


def forward(query: Tensor, key: Tensor, weight: Tensor, index_topk: int) -> tuple[Tensor, Tensor]:
    """The fast torch form: some queries at a time, so that their products stay in the cache; scores and keys."""
    num_sequences, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    key_BKS = key.to(weight.dtype).mT
    scores_BTS = weight.new_empty(num_sequences, num_queries, num_keys)
    keys_BTY = torch.full((num_sequences, num_queries, min(index_topk, num_keys)), -1, device=query.device)
    for first, last in _blocks(query, num_keys):
        query_BXK = query[:, first:last].to(weight.dtype).flatten(1, 2)
        matches_NHS = torch.bmm(query_BXK, key_BKS).relu_().view(-1, num_heads, num_keys)
        weight_N1H = weight[:, first:last].reshape(-1, 1, num_heads)
        scores_BTS[:, first:last] = torch.bmm(weight_N1H, matches_NHS).view(num_sequences, last - first, num_keys)
        # The keys after the block's last query are hidden from all of its queries.
        chosen_BTY = select_last(scores_BTS[:, first:last, : num_keys - num_queries + last], index_topk)
        keys_BTY[:, first:last, : chosen_BTY.shape[-1]] = chosen_BTY
    return scores_BTS, keys_BTY


def _blocks(query: Tensor, num_keys: int) -> Iterator[tuple[int, int]]:
    """The first of some consecutive queries, and the one after their last."""
    num_sequences, num_queries, num_heads, _ = query.shape
    rows = max(1, _BLOCK_PRODUCTS // max(1, num_sequences * num_heads * num_keys))
    for first in range(0, num_queries, rows):
        yield first, min(first + rows, num_queries)


def select_last(scores: Tensor, index_topk: int) -> Tensor:
    """`select` where the queries are the last of the positions.

    In float32 a score and its place make one integer, and no two are equal: `topk` need not keep an order of equals,
    which only a sort of the whole row does.
    """
    num_queries, num_keys = scores.shape[1:]
    seen_TS = visible(num_queries, num_keys, scores.device)
    if scores.dtype != torch.float32:
        return select(scores, seen_TS, index_topk=index_topk)
    bits_BTS = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # Negative numbers are stored as sign and size: the larger the bits, the smaller the number.
    order_BTS = bits_BTS ^ ((bits_BTS >> 31) & torch.iinfo(torch.int32).max)
    order_BTS.masked_fill_(scores.isnan(), torch.iinfo(torch.int32).max)
    lowest_last_S = torch.arange(num_keys - 1, -1, -1, device=scores.device)
    ranked_BTS = (order_BTS.long() << 32) | lowest_last_S
    hidden = torch.iinfo(torch.int64).min
    best_BTY = ranked_BTS.masked_fill_(~seen_TS, hidden).topk(min(index_topk, num_keys), dim=-1).values
    return (num_keys - 1 - (best_BTY & 0xFFFFFFFF)).masked_fill_(best_BTY == hidden, -1)


def backward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fast torch form: the gradients of query, key and weight; products are made again and never kept."""
    num_sequences, _, num_heads, _ = query.shape
    num_keys = key.shape[1]
    key_BSK = key.to(weight.dtype)
    grad_query, grad_weight = query.new_empty(query.shape), weight.new_empty(weight.shape)
    grad_key_BKS = key_BSK.new_zeros(key_BSK.mT.shape)
    for first, last in _blocks(query, num_keys):
        query_BXK = query[:, first:last].to(weight.dtype).flatten(1, 2)
        weight_BX1 = weight[:, first:last].flatten(1, 2).unsqueeze(-1)
        grad_NS = grad[:, first:last].reshape(-1, num_keys)
        matches_NHS = torch.bmm(query_BXK, key_BSK.mT).relu_().view(-1, num_heads, num_keys)
        grad_NHS = grad_NS.unsqueeze(1).expand_as(matches_NHS)
        passed_NHS = torch.ops.aten.threshold_backward(grad_NHS, matches_NHS, 0)
        # Not a product of matrices: those of one row and one column round worse than torch's pairwise sum.
        grad_weight[:, first:last] = matches_NHS.mul_(grad_NHS).sum(-1).view(num_sequences, last - first, num_heads)
        passed_BXS = passed_NHS.view(num_sequences, query_BXK.shape[1], num_keys)
        # The weight multiplies what is narrow, heads of K numbers, and not rows of S.
        grad_query[:, first:last] = torch.bmm(passed_BXS, key_BSK).mul_(weight_BX1).view_as(grad_query[:, first:last])
        # Few rows of many columns: the matrix library adds up a narrow product of many terms less exactly.
        grad_key_BKS.baddbmm_((query_BXK * weight_BX1).mT, passed_BXS)
    return grad_query, grad_key_BKS.mT.to(key.dtype).contiguous(), grad_weight


@torch.library.custom_op("workbench_kernels::sparse_select", mutates_args=())
def _sparse_select(query: Tensor, key: Tensor, weight: Tensor, index_topk: int, fused: bool) -> tuple[Tensor, Tensor]:
    if fused:
        from workbench_kernels.fused import sparse_select as twin

        return twin.forward(query, key, weight, index_topk)
    return forward(query, key, weight, index_topk)


@_sparse_select.register_fake
def _(query: Tensor, key: Tensor, weight: Tensor, index_topk: int, fused: bool) -> tuple[Tensor, Tensor]:
    scores = weight.new_empty(*weight.shape[:2], key.shape[1])
    return scores, query.new_empty(*query.shape[:2], min(index_topk, key.shape[1]), dtype=torch.int64)


@torch.library.custom_op("workbench_kernels::sparse_select_grad", mutates_args=())
def _sparse_select_grad(
    grad: Tensor, query: Tensor, key: Tensor, weight: Tensor, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and weight."""
    if fused:
        from workbench_kernels.fused import sparse_select as twin

        return twin.backward(grad, query, key, weight)
    return backward(grad, query, key, weight)


@_sparse_select_grad.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    query, key, weight, _, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, weight)


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *_sparse_select_grad(grad, *ctx.saved_tensors, ctx.fused), None, None


_sparse_select.register_autograd(_backward, setup_context=_save)


def _check_count(index_topk: int) -> None:
    if index_topk < 1:
        raise ValueError(f"index_topk={index_topk} must be at least 1")


def _check(query: Tensor, key: Tensor, weight: Tensor, index_topk: int) -> None:
    _check_count(index_topk)
    check_devices(query, key=key, weight=weight)
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, weight {list(weight.shape)}"
    if query.ndim != 4 or key.ndim != 3 or weight.shape != query.shape[:3]:
        raise ValueError(f"{shapes} must be [B, T, H, K], [B, S, K] and [B, T, H]")
    if key.shape[0] != query.shape[0] or key.shape[2] != query.shape[3] or 0 in query.shape[2:]:
        raise ValueError(f"{shapes} must be [B, T, H, K], [B, S, K] and [B, T, H] with H > 0 and K > 0")
    if query.shape[1] > key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries are more than {key.shape[1]} keys: the queries are the last positions"
        )
    if not query.is_floating_point() or query.dtype != key.dtype:
        raise ValueError(f"query ({query.dtype}) and key ({key.dtype}) must have one floating dtype")
    wide = torch.promote_types(query.dtype, torch.float32)
    if weight.dtype != wide:
        raise ValueError(f"weight ({weight.dtype}) must be {wide}, as the scores of a query in {query.dtype} are")
