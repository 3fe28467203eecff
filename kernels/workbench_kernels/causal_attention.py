"""Softmax attention that sees no future.

Letters: B sequences, T queries, S keys, H query heads, G key/value heads, K key width, U value width,
X = B * H.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import asked, check_devices, resolve, unwatched

_BLOCK_ROWS = 64
# The blockwise form keeps half of every T x S matrix for backward; beyond this many keys torch's flash form is used.
LONGEST_KEPT = 1024


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`softmax(scale * query @ key.T) @ value`, where the T queries are the last of the S positions.

    Args:
        query: [B, T, H, K].
        key: [B, S, G, K] with S >= T; G divides H, and H / G consecutive query heads share a key/value head.
        value: [B, S, G, U].
        scale: multiplies the products before the softmax, whose statistics are float32 or wider.
        window: a query reads its own key and the window - 1 before; None: all before.
        sinks: [H], for each head one more logit in the softmax, with nothing to give: it takes weight.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`. Where other ops take their definition,
            `auto` is torch's flash form: the definition makes T x S matrices. With a window or sinks it is the
            definition for some queries at a time, over the keys that these can see.

    Returns:
        [B, T, H, U] in the dtype of the inputs.

    Raises:
        ValueError: shapes or dtypes do not fit, or the window is below 1.

    Source: Vaswani et al., arXiv 1706.03762, section 3.2.1; Beltagy et al., arXiv 2004.05150 (window); Xiao et al.,
    arXiv 2309.17453, and gpt-oss (sinks).
    """
    _check(query, key, value)
    _check_options(query, window, sinks)
    tier = resolve("causal_attention", impl, query.device, query.dtype)
    if asked(impl) == "reference" or query.numel() == 0:
        return reference(query, key, value, scale, window=window, sinks=sinks)
    if window is not None or sinks is not None:
        return by_blocks(query, key, value, scale, window=window, sinks=sinks)
    # Products in float16 overflow early; torch's flash form keeps them in float32.
    blockwise = tier == "torch" and query.dtype != torch.float16
    if blockwise and unwatched(query, key, value):
        return alone(query, key, value, scale)
    if blockwise and key.shape[1] <= LONGEST_KEPT:
        return _causal_attention(query, key, value, scale)[0]
    return flash(query, key, value, scale)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition: all scores at once."""
    group_size = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group_size, dim=2) for x in (key, value))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", query, key)
    wide = scores_BHTS.to(torch.promote_types(query.dtype, torch.float32)) * scale
    hidden_TS = ~visible(query.shape[1], key.shape[1], query.device, window=window)
    logits_BHTS = wide.masked_fill(hidden_TS, float("-inf"))
    if sinks is not None:
        sinks_BHT1 = sinks.to(wide.dtype)[None, :, None, None].expand(*logits_BHTS.shape[:3], 1)
        logits_BHTS = torch.cat((logits_BHTS, sinks_BHT1), dim=-1)
    weights_BHTS = logits_BHTS.softmax(dim=-1)[..., : key.shape[1]].to(query.dtype)
    return torch.einsum("bhts,bshu->bthu", weights_BHTS, value)


def visible(num_queries: int, num_keys: int, device: torch.device, *, window: int | None = None) -> Tensor:
    """[T, S], True where a query may look: at its own position, the last T of S, and those before or in its window."""
    past = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(past)
    return seen if window is None else seen.triu(past - window + 1)


def by_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, window: int | None, sinks: Tensor | None
) -> Tensor:
    """The definition for some queries at a time, over the keys from the first one's window to the last one."""
    past, mixed = key.shape[1] - query.shape[1], []
    for first in range(0, query.shape[1], _BLOCK_ROWS):
        rows = query[:, first : first + _BLOCK_ROWS]
        last = past + first + rows.shape[1]
        begin = 0 if window is None else max(0, past + first - window + 1)
        mixed.append(reference(rows, key[:, begin:last], value[:, begin:last], scale, window=window, sinks=sinks))
    return torch.cat(mixed, dim=1)


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Torch's own, without a T x S matrix: it wants values as wide as keys, so the narrower of the two is filled up."""
    width = max(query.shape[-1], value.shape[-1])
    padded = [F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value)]
    square = query.shape[1] == key.shape[1]
    mask = None if square else visible(query.shape[1], key.shape[1], query.device)
    mixed = F.scaled_dot_product_attention(
        *padded, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=query.shape[2] != key.shape[2]
    )
    return mixed.transpose(1, 2)[..., : value.shape[-1]]


def alone(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The blockwise form where nothing is kept for backward: the scores of one block at a time, whatever the length."""
    num_sequences, num_queries, num_heads, _ = query.shape
    num_groups, rows = key.shape[2], _BLOCK_ROWS if key.shape[1] <= LONGEST_KEPT else 2 * _BLOCK_ROWS
    if num_queries == 1:
        # One sequence at a time, the query heads that share a key as rows of one product: no key or value is copied.
        mixed = []
        for query_GYK, key_GSK, value_GSU in zip(
            query.unflatten(2, (num_groups, -1)).squeeze(1), key.transpose(1, 2), value.transpose(1, 2), strict=True
        ):
            weights_GYS = torch.bmm(query_GYK, key_GSK.mT).mul_(scale).softmax(-1)
            mixed.append(torch.bmm(weights_GYS, value_GSU).flatten(0, 1))
        return torch.stack(mixed).unsqueeze(1) if mixed else value.new_empty(0, 1, num_heads, value.shape[-1])
    query_XTK, key_XSK, value_XSU = (_by_head(x, num_heads) for x in (query, key, value))
    out_XTU = value.new_empty(query_XTK.shape[0], num_queries, value.shape[-1])
    future = ~visible(rows, rows, query.device)
    for block in blocks(num_queries, key.shape[1], num_heads, rows):
        weights = _scores(block, query_XTK, key_XSK, scale, future)
        torch.softmax(weights, dim=-1, out=weights)
        torch.bmm(weights, value_XSU[:, : block.seen], out=out_XTU[:, block.first : block.last])
    return out_XTU.unflatten(0, (num_sequences, num_heads)).transpose(1, 2)


class Block(NamedTuple):
    """Some consecutive queries, the keys before and among them, and where their weights lie in the kept buffer."""

    first: int
    last: int
    seen: int
    offset: int
    num_heads: int

    def weights(self, kept: Tensor, num_sequences: int) -> Tensor:
        """This block's part of the buffer, [X, rows, seen]."""
        shape = (num_sequences * self.num_heads, self.last - self.first, self.seen)
        first = num_sequences * self.offset
        return kept[first : first + math.prod(shape)].view(shape)


def blocks(num_queries: int, num_keys: int, num_heads: int, rows: int = _BLOCK_ROWS) -> Iterator[Block]:
    """Cut the queries so that each block skips the keys that lie in the future of all its rows."""
    offset = 0
    for first in range(0, num_queries, rows):
        last = min(first + rows, num_queries)
        seen = num_keys - num_queries + last
        yield Block(first, last, seen, offset, num_heads)
        offset += num_heads * (last - first) * seen


def _scores(block: Block, query_XTK: Tensor, key_XSK: Tensor, scale: float, future: Tensor) -> Tensor:
    """[X, rows, seen], the scaled products of a block's queries, minus infinity for the keys after each."""
    rows = block.last - block.first
    scores = torch.bmm(query_XTK[:, block.first : block.last], key_XSK[:, : block.seen].mT).mul_(scale)
    scores[:, :, block.seen - rows :].masked_fill_(future[:rows, :rows], float("-inf"))
    return scores


def _kept_size(num_queries: int, num_keys: int, num_heads: int) -> int:
    """Weights of all `blocks` of one sequence, as a formula: the compiler may not know the lengths."""
    past, whole, rest = num_keys - num_queries, num_queries // _BLOCK_ROWS, num_queries % _BLOCK_ROWS
    of_whole = _BLOCK_ROWS * (whole * past + _BLOCK_ROWS * whole * (whole + 1) // 2)
    return num_heads * (of_whole + rest * num_keys)


@torch.library.custom_op("workbench_kernels::causal_attention", mutates_args=(), device_types="cpu")
def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output and, for backward, the weights of all blocks one after the other."""
    num_sequences, num_queries, num_heads, _ = query.shape
    query_XTK, key_XSK, value_XSU = (_by_head(x, num_heads) for x in (query, key, value))
    out_XTU = value.new_empty(query_XTK.shape[0], num_queries, value.shape[-1])
    kept = query.new_empty(num_sequences * _kept_size(num_queries, key.shape[1], num_heads))
    future = ~visible(_BLOCK_ROWS, _BLOCK_ROWS, query.device)
    for block in blocks(num_queries, key.shape[1], num_heads):
        weights = block.weights(kept, num_sequences)
        torch.softmax(_scores(block, query_XTK, key_XSK, scale, future), dim=-1, out=weights)
        out_XTU[:, block.first : block.last] = torch.bmm(weights, value_XSU[:, : block.seen])
    return out_XTU.unflatten(0, (num_sequences, num_heads)).transpose(1, 2).contiguous(), kept


@_causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kept = _kept_size(query.shape[1], key.shape[1], query.shape[2])
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[0] * kept)


@torch.library.custom_op("workbench_kernels::causal_attention_grad", mutates_args=(), device_types="cpu")
def _causal_attention_grad(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    num_sequences, num_queries, num_heads, _ = query.shape
    query_XTK, key_XSK, value_XSU, grad_XTU = (_by_head(x, num_heads) for x in (query, key, value, grad))
    grad_query_XTK = torch.empty_like(query_XTK)
    grad_key_XSK, grad_value_XSU = torch.zeros_like(key_XSK), torch.zeros_like(value_XSU)
    for block in blocks(num_queries, key.shape[1], num_heads):
        weights = block.weights(kept, num_sequences)
        query_rows, grad_rows = (x[:, block.first : block.last] for x in (query_XTK, grad_XTU))
        grad_value_XSU[:, : block.seen].baddbmm_(weights.mT, grad_rows)
        grad_weights = torch.bmm(grad_rows, value_XSU[:, : block.seen].mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
        grad_query_XTK[:, block.first : block.last] = torch.bmm(grad_scores, key_XSK[:, : block.seen])
        grad_key_XSK[:, : block.seen].baddbmm_(grad_scores.mT, query_rows)
    return (
        _by_position(grad_query_XTK, query),
        _by_position(grad_key_XSK, key),
        _by_position(grad_value_XSU, value),
    )


@_causal_attention_grad.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    by_head = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key, value))
    grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in by_head)
    return grad_query, grad_key, grad_value


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, G, K] -> [X, S, K] with X = B * H, the head of a group repeated for every query head that shares it.

    No copy is made of what already lies head by head and is not shared.
    """
    x_BGSK = x.transpose(1, 2)
    group_size = num_heads // x.shape[2]
    if group_size > 1:
        x_BGSK = x_BGSK.repeat_interleave(group_size, dim=1)
    return x_BGSK.contiguous().flatten(0, 1)


def _by_position(x_XSK: Tensor, like: Tensor) -> Tensor:
    """The way back, to the shape of `like` in the layout head by head; the query heads of a group are summed."""
    num_sequences, _, num_groups, _ = like.shape
    x_BGYSK = x_XSK.view(num_sequences, num_groups, -1, *x_XSK.shape[1:])
    x_BGSK = x_BGYSK.squeeze(2) if x_BGYSK.shape[2] == 1 else x_BGYSK.sum(2)
    return x_BGSK.transpose(1, 2)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, scale = inputs
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise a zero gradient of what is kept is made for every backward
    ctx.save_for_backward(query, key, value, output[1])


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return *_causal_attention_grad(grad, *ctx.saved_tensors, ctx.scale), None


_causal_attention.register_autograd(_backward, setup_context=_save)


def _check_options(query: Tensor, window: int | None, sinks: Tensor | None) -> None:
    check_devices(query, sinks=sinks)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a query reads its own key")
    if sinks is not None and (sinks.shape != query.shape[2:3] or not sinks.is_floating_point()):
        raise ValueError(f"sinks ({sinks.dtype} {list(sinks.shape)}) must be [{query.shape[2]}], of a floating dtype")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_devices(query, key=key, value=value)
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"{shapes} must have 4 axes each")
    fits = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not fits or key.shape[2] == 0 or query.shape[2] % key.shape[2] != 0:
        raise ValueError(f"{shapes} must be [B, T, H, K], [B, S, G, K], [B, S, G, U] with G a divisor of H")
    if query.shape[1] > key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries are more than {key.shape[1]} keys: the queries are the last positions"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query ({query.dtype}), key ({key.dtype}) and value ({value.dtype}) must have one floating dtype"
        )
