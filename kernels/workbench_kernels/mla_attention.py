"""Causal attention of multi-head latent attention, for training and prefill.

Letters: B sequences, T queries, S keys, H heads, K width of the part of a head matched by content, R of the part
matched by position, U value width, W = K + R, X = B * H.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from workbench_kernels.causal_attention import causal_attention, visible
from workbench_kernels.tier import asked, check_devices, resolve, unwatched

# Of K, R and U: the twin keeps tiles of whole heads, and float32 takes more room than twice that of 16 bits.
MAX_WIDTHS, MAX_WIDTHS_FLOAT32 = (256, 64, 256), (128, 64, 128)
_BLOCK_ROWS = 64


def most_for(dtype: torch.dtype) -> tuple[int, int, int]:
    """The widths K, R and U of the widest heads that the Triton twin takes."""
    return MAX_WIDTHS_FLOAT32 if dtype == torch.float32 else MAX_WIDTHS


def fits_twin(key_width: int, rope_width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether the Triton twin takes heads of these widths."""
    return all(x <= most for x, most in zip((key_width, rope_width, value_width), most_for(dtype), strict=True))


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    softmax_scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`softmax(softmax_scale * (q_nope @ k_nope.T + q_rope @ k_rope.T)) @ value`, with no look at later positions.

    Args:
        q_nope: [B, T, H, K].
        q_rope: [B, T, H, R], rotated.
        k_nope: [B, S, H, K] with S >= T: the queries are those of the last T positions.
        k_rope: [B, S, R], rotated: one key that all heads share.
        value: [B, S, H, U].
        softmax_scale: multiplies the sum of both products before the softmax, whose statistics are float32 or wider.
        cu_seqlens: int32 [documents + 1], from 0 on: document i is the positions `cu_seqlens[i]:cu_seqlens[i + 1]`, and
            a query reads keys of its own document only. Then B = 1 and T = S. None: every sequence is one document.
        window: a query reads its own key and the window - 1 before; None: all before.
        sinks: [H], for each head one more logit in the softmax, with nothing to give: it takes weight.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`. Where other ops take their definition,
            `auto` is the torch form: the definition makes T x S matrices.

    Returns:
        [B, T, H, U] in the dtype of the inputs. Positions at and beyond `cu_seqlens[-1]` give zeros, and their
        gradients are zeros, whatever they hold.

    Raises:
        ValueError: shapes or dtypes do not fit, or the window is below 1. The torch form also refuses `cu_seqlens` that
            does not begin at 0, decreases or ends beyond T; the others would have to wait for the device to see it.

    The twin's backward makes weights again from the logarithm of their sum, as every flash attention does: they are
    wrong by as many roundings as a logit is large, which shows in gradients where logits lie tens apart.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; Dao, arXiv 2307.08691 (the twin); window and sinks as in
    `causal_attention`.
    """
    _check(q_nope, q_rope, k_nope, k_rope, value)
    _check_options(q_nope, k_nope, cu_seqlens, window, sinks)
    fits = fits_twin(q_nope.shape[3], q_rope.shape[3], value.shape[3], value.dtype)
    tier = resolve("mla_attention", impl, q_nope.device, q_nope.dtype, fits=fits)
    if asked(impl) == "reference" or q_nope.numel() == 0:
        return reference(
            q_nope, q_rope, k_nope, k_rope, value, softmax_scale, cu_seqlens=cu_seqlens, window=window, sinks=sinks
        )
    if tier != "fused" and cu_seqlens is None and window is None and sinks is None:
        query, key = join_by_head(q_nope, q_rope), join_by_head(k_nope, _of_every_head(k_rope, k_nope))
        return causal_attention(query, key, value, softmax_scale)
    inputs = q_nope, q_rope, k_nope, k_rope, value, sinks, cu_seqlens, softmax_scale, window
    if tier != "fused" and unwatched(*inputs[:7]):
        return forward(*inputs)[0]
    return _mla_attention(*inputs, tier == "fused")[0]


def reference(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    softmax_scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition: all scores at once, differentiated by autograd."""
    num_queries, num_keys, device = q_nope.shape[1], k_nope.shape[1], q_nope.device
    hidden_TS = ~visible(num_queries, num_keys, device, window=window)
    owned_T = torch.ones(num_queries, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        position_T = torch.arange(num_queries, dtype=torch.int32, device=device)
        document_T = torch.searchsorted(cu_seqlens, position_T, right=True)
        hidden_TS = hidden_TS | (document_T[:, None] != document_T[None, :])
        owned_T = position_T < cu_seqlens[-1]
        q_nope, q_rope, k_nope, value = (x.where(owned_T[:, None, None], 0) for x in (q_nope, q_rope, k_nope, value))
        k_rope = k_rope.where(owned_T[:, None], 0)
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    by_content_BHTS = torch.einsum("bthk,bshk->bhts", q_nope, k_nope).to(wide)
    by_position_BHTS = torch.einsum("bthr,bsr->bhts", q_rope, k_rope).to(wide)
    logits_BHTS = ((by_content_BHTS + by_position_BHTS) * softmax_scale).masked_fill(hidden_TS, float("-inf"))
    if sinks is not None:
        sinks_BHT1 = sinks.to(wide)[None, :, None, None].expand(*logits_BHTS.shape[:3], 1)
        logits_BHTS = torch.cat((logits_BHTS, sinks_BHT1), dim=-1)
    weights_BHTS = logits_BHTS.softmax(dim=-1)[..., :num_keys].to(value.dtype)
    return torch.einsum("bhts,bshu->bthu", weights_BHTS, value).where(owned_T[:, None, None], 0)


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The torch form, for some queries of one document at a time: the output and the log of each softmax's sum."""
    query_XTW, key_XSW, value_XSU = _heads(q_nope, q_rope, k_nope, k_rope, value)
    wide = torch.promote_types(value.dtype, torch.float32)
    out_XTU = value.new_zeros(*query_XTW.shape[:2], value.shape[3])
    lse_XT = value.new_zeros(query_XTW.shape[:2], dtype=wide)
    sinks_X1 = _of_every_sequence(sinks, len(value), wide)
    for queries, keys in _tiles(q_nope.shape[1], k_nope.shape[1], window, cu_seqlens):
        logits = _logits(query_XTW[:, queries], key_XSW[:, keys], softmax_scale, window)
        weights, _, lse_XT[:, queries] = _softmax(logits, sinks_X1)
        out_XTU[:, queries] = torch.bmm(weights.to(value.dtype), value_XSU[:, keys])
    return _by_position(out_XTU, len(value)), lse_XT.unflatten(0, (len(value), -1))


def _of_every_sequence(sinks: Tensor | None, num_sequences: int, dtype: torch.dtype) -> Tensor | None:
    return None if sinks is None else sinks.to(dtype).repeat(num_sequences)[:, None]


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The weights of the keys, those of the sinks, and the logarithm of the sum; `logits` are overwritten."""
    largest = logits.amax(-1) if sinks is None else logits.amax(-1).maximum(sinks)
    weights = logits.sub_(largest.unsqueeze(-1)).exp_()
    total, taken = weights.sum(-1), None
    if sinks is not None:
        taken = (sinks - largest).exp_()
        total += taken
        taken /= total
    return weights.div_(total.unsqueeze(-1)), taken, total.log_().add_(largest)


def backward(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The torch form: the gradients of all six in the order of `forward`; without sinks the last one is empty.

    A block has all keys of its queries, so it makes their weights as forward did: from the logarithm of their sum they
    would be as inexact as it is large.
    """
    num_sequences, key_width = len(value), q_nope.shape[3]
    wide = torch.promote_types(value.dtype, torch.float32)
    query_XTW, key_XSW, value_XSU = _heads(q_nope, q_rope, k_nope, k_rope, value)
    grad_XTU, sinks_X1 = _by_head(grad), _of_every_sequence(sinks, num_sequences, wide)
    grad_query_XTW = torch.zeros_like(query_XTW)
    # Sums over several blocks of queries, and of the shared key over all heads, are rounded once.
    grad_key_XSW, grad_value_XSU = (torch.zeros_like(x, dtype=wide) for x in (key_XSW, value_XSU))
    grad_sinks_X = value.new_zeros(len(query_XTW), dtype=wide)
    for queries, keys in _tiles(q_nope.shape[1], k_nope.shape[1], window, cu_seqlens):
        query_rows, key_rows, grad_rows = query_XTW[:, queries], key_XSW[:, keys], grad_XTU[:, queries]
        weights, taken, _ = _softmax(_logits(query_rows, key_rows, softmax_scale, window), sinks_X1)
        grad_value_XSU[:, keys] += torch.bmm(weights.to(grad.dtype).mT, grad_rows)
        grad_weights = torch.bmm(grad_rows, value_XSU[:, keys].mT).to(wide)
        delta = (weights * grad_weights).sum(-1)
        if taken is not None:
            grad_sinks_X -= (taken * delta).sum(-1)
        grad_scores = weights.mul_(grad_weights.sub_(delta.unsqueeze(-1))).mul_(softmax_scale).to(grad.dtype)
        grad_query_XTW[:, queries] = torch.bmm(grad_scores, key_rows)
        grad_key_XSW[:, keys] += torch.bmm(grad_scores.mT, query_rows)
    grad_query_BTHW, grad_key_BSHW = (_by_position(x, num_sequences) for x in (grad_query_XTW, grad_key_XSW))
    grad_sinks = value.new_empty(0)
    if sinks is not None:
        grad_sinks = grad_sinks_X.view(num_sequences, len(sinks)).sum(0).to(sinks.dtype)
    return (
        # Copies even where the parts of a single row are contiguous: an op may not return two views of one tensor.
        grad_query_BTHW[..., :key_width].clone(memory_format=torch.contiguous_format),
        grad_query_BTHW[..., key_width:].clone(memory_format=torch.contiguous_format),
        grad_key_BSHW[..., :key_width].to(grad.dtype).clone(memory_format=torch.contiguous_format),
        grad_key_BSHW[..., key_width:].sum(2).to(grad.dtype),
        _by_position(grad_value_XSU, num_sequences).to(grad.dtype).contiguous(),
        grad_sinks,
    )


def join_by_head(nope: Tensor, rope: Tensor) -> Tensor:
    """[B, S, H, W], both parts side by side, laid out head by head as attention reads them: one copy, not two."""
    return torch.cat((nope.transpose(1, 2), rope.transpose(1, 2)), dim=-1).transpose(1, 2)


def _of_every_head(k_rope: Tensor, k_nope: Tensor) -> Tensor:
    return k_rope.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)


def _heads(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [X, T, W], keys [X, S, W] and values [X, S, U]."""
    key = join_by_head(k_nope, _of_every_head(k_rope, k_nope))
    return _by_head(join_by_head(q_nope, q_rope)), _by_head(key), _by_head(value)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _by_position(x_XTU: Tensor, num_sequences: int) -> Tensor:
    num_heads = x_XTU.shape[0] // max(1, num_sequences)
    return x_XTU.unflatten(0, (num_sequences, num_heads)).transpose(1, 2)


def _tiles(
    num_queries: int, num_keys: int, window: int | None, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Some consecutive queries of one document, and the keys from the first one's window to the last one."""
    past = num_keys - num_queries
    for start, end in [(0, num_queries)] if cu_seqlens is None else documents(cu_seqlens, num_queries):
        for first in range(start, end, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, end)
            oldest = start if window is None else max(start, past + first - window + 1)
            yield slice(first, last), slice(oldest, past + last)


def documents(cu_seqlens: Tensor, num_positions: int) -> list[tuple[int, int]]:
    """First and last position, exclusive, of each.

    Raises:
        ValueError: they do not begin at 0, overlap or go beyond the positions.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > num_positions:
        raise ValueError(f"cu_seqlens={ends} must begin at 0, not decrease, and end within {num_positions} positions")
    return list(pairwise(ends))


def _logits(query: Tensor, key: Tensor, softmax_scale: float, window: int | None) -> Tensor:
    """[X, queries, keys] in float32 or wider, where the queries are the last of these keys' positions."""
    hidden = ~visible(query.shape[1], key.shape[1], query.device, window=window)
    scores = torch.bmm(query, key.mT).to(torch.promote_types(query.dtype, torch.float32))
    return scores.mul_(softmax_scale).masked_fill_(hidden, float("-inf"))


@torch.library.custom_op("workbench_kernels::mla_attention", mutates_args=())
def _mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    window: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and, for backward, the log of each softmax's sum, [B, H, T]: the twin's to the base 2."""
    inputs = q_nope, q_rope, k_nope, k_rope, value, sinks, cu_seqlens, softmax_scale, window
    if fused:
        from workbench_kernels.fused import mla_attention as twin

        return twin.forward(*inputs)
    out, lse = forward(*inputs)
    return out.contiguous(), lse


@_mla_attention.register_fake
def _(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    window: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    num_sequences, num_queries, num_heads, _ = q_nope.shape
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    return (
        q_nope.new_empty(num_sequences, num_queries, num_heads, value.shape[3]),
        q_nope.new_empty(num_sequences, num_heads, num_queries, dtype=wide),
    )


@torch.library.custom_op("workbench_kernels::mla_attention_grad", mutates_args=())
def _mla_attention_grad(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = q_nope, q_rope, k_nope, k_rope, value, sinks, cu_seqlens
    if fused:
        from workbench_kernels.fused import mla_attention as twin

        return twin.backward(grad, *inputs, out, lse, softmax_scale, window)
    return backward(grad, *inputs, softmax_scale, window)


@_mla_attention_grad.register_fake
def _(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = [x.new_empty(x.shape) for x in (q_nope, q_rope, k_nope, k_rope, value)]
    grad_q_nope, grad_q_rope, grad_k_nope, grad_k_rope, grad_value = made
    grad_sinks = value.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return grad_q_nope, grad_q_rope, grad_k_nope, grad_k_rope, grad_value, grad_sinks


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softmax_scale, ctx.window, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    *grads, grad_sinks = _mla_attention_grad(grad, *saved, ctx.softmax_scale, ctx.window, ctx.fused)
    return *grads, None if saved[5] is None else grad_sinks, None, None, None, None


_mla_attention.register_autograd(_backward, setup_context=_save)


def _check(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> None:
    tensors = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "value": value}
    check_devices(q_nope, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, value=value)
    if [x.ndim for x in tensors.values()] != [4, 4, 4, 3, 4]:
        raise ValueError(f"{_shapes(tensors)} must have 4 axes each, k_rope 3")
    (sequences, queries, heads, key_width), keys, rope_width = q_nope.shape, k_nope.shape[1], q_rope.shape[3]
    fits = (
        q_rope.shape[:3] == q_nope.shape[:3]
        and k_nope.shape == (sequences, keys, heads, key_width)
        and k_rope.shape == (sequences, keys, rope_width)
        and value.shape[:3] == (sequences, keys, heads)
    )
    if not fits or 0 in (heads, key_width, rope_width, value.shape[3]):
        raise ValueError(
            f"{_shapes(tensors)} must be [B, T, H, K], [B, T, H, R], [B, S, H, K], [B, S, R], [B, S, H, U] "
            "with H, K, R, U > 0"
        )
    if queries > keys:
        raise ValueError(f"{queries} queries are more than {keys} keys: the queries are the last positions")
    if not q_nope.is_floating_point() or any(x.dtype != q_nope.dtype for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"{dtypes} must have one floating dtype")


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def _check_options(
    q_nope: Tensor, k_nope: Tensor, cu_seqlens: Tensor | None, window: int | None, sinks: Tensor | None
) -> None:
    check_devices(q_nope, cu_seqlens=cu_seqlens, sinks=sinks)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a query reads its own key")
    if sinks is not None and (sinks.shape != q_nope.shape[2:3] or not sinks.is_floating_point()):
        raise ValueError(f"sinks ({sinks.dtype} {list(sinks.shape)}) must be [{q_nope.shape[2]}], of a floating dtype")
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens ({cu_seqlens.dtype} {list(cu_seqlens.shape)}) must be int32 [documents + 1]")
    if len(q_nope) != 1 or q_nope.shape[1] != k_nope.shape[1]:
        raise ValueError(
            f"cu_seqlens divides one sequence with as many queries as keys, not {len(q_nope)} with {q_nope.shape[1]} "
            f"and {k_nope.shape[1]}"
        )
