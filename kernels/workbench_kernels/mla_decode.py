"""Multi-head latent attention of the newest tokens, in the absorbed form: all heads read one cached latent per token.

Letters: B sequences, T newest tokens of each, H query heads, C latent width, R rotary width, W = C + R, S cached
tokens, M = T * H rows that read the same latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.quantize_blockwise import WIDTH, dequantize
from workbench_kernels.tier import check_devices, resolve, unwatched

MAX_LATENT = 512  # the twin keeps the mixed latents of its rows in registers
MAX_ODD_LATENT = 64
MAX_ROPE = 64


class MlaDecoded(NamedTuple):
    """The mixed latents, and the logarithm of what the softmax divided by: parts over other tokens merge by it."""

    out: Tensor
    lse: Tensor


class Float8Cache(NamedTuple):
    """A latent cache of one byte a number: a token's latent is `latent * scale`, a scale for every 128 numbers."""

    latent: Tensor
    scale: Tensor
    rope: Tensor


def fits_twin(latent_width: int, rope_width: int) -> bool:
    """Whether the Triton twin takes latents and positional keys of these widths."""
    most = MAX_ODD_LATENT if is_odd(latent_width, rope_width) else MAX_LATENT
    return latent_width <= most and rope_width <= MAX_ROPE


def is_odd(latent_width: int, rope_width: int) -> bool:
    """Whether vector loads cannot read a token."""
    return latent_width % 16 != 0 or rope_width % 16 != 0


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor | Float8Cache,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor,
    softmax_scale: float,
    impl: str = "auto",
) -> MlaDecoded:
    """`softmax(softmax_scale * (q_nope @ latent.T + q_rope @ rope.T)) @ latent` over each sequence's cached tokens.

    The T queries are the last of the sequence's tokens, which the cache holds already, and see none after their own. A
    query before the first token, of a sequence with fewer than T, sees nothing: zeros, and minus infinity. What lies
    beyond a sequence's tokens does not matter. Forward only: gradients come through the definition alone
    (`impl="reference"`).

    Args:
        q_nope: [B, T, H, C], queries that the keys' up-projection has absorbed.
        q_rope: [B, T, H, R], of the dtype of `q_nope`.
        kv_cache: [B, S, C + R], latent and positional key side by side, of the dtype of `q_nope`; with a block table
            [pages, page size, C + R], as FlashMLA's pages without their axis of one head. Or a `Float8Cache` of latent
            (float8_e4m3fn, [..., C]), scale (float32, [..., ceil(C / 128)]) and rope ([..., R], floating), whose
            latents are rounded to the dtype of `q_nope`.
        block_table: int32 [B, most pages], the pages of each sequence in order; what follows them may be anything.
        cache_seqlens: int32 [B], the tokens of each sequence, from 0 to what the cache can hold.
        softmax_scale: multiplies the products; that of the decompressed width, as everywhere in latent attention.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        out [B, T, H, C] in the dtype of `q_nope`; lse [B, T, H], the natural logarithm of the sum of exponentials, in
        float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a length or a page lies outside the cache. The twin looks
            at neither: it cuts lengths, and believes the block table.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; Flash-Decoding, Dao et al., 2023 (parts of the
    keys side by side); FlashMLA (layout of the cache).
    """
    latent, scale, rope = kv_cache if isinstance(kv_cache, Float8Cache) else (kv_cache, None, None)
    check_devices(
        q_nope, q_rope=q_rope, kv_cache=latent, block_table=block_table, cache_seqlens=cache_seqlens,
        **{"kv_cache.scale": scale, "kv_cache.rope": rope},
    )  # fmt: skip
    _check_queries(q_nope, q_rope)
    if scale is None or rope is None:
        _check_cache(q_nope, q_rope, latent)
    else:
        _check_float8(q_nope, q_rope, latent, scale, rope)
    _check_lengths(q_nope.shape[0], latent, block_table, cache_seqlens)
    tier = resolve("mla_decode", impl, q_nope.device, q_nope.dtype, fits=fits_twin(q_nope.shape[-1], q_rope.shape[-1]))
    if tier == "reference":
        return reference(
            q_nope, q_rope, kv_cache,
            block_table=block_table, cache_seqlens=cache_seqlens, softmax_scale=softmax_scale,
        )  # fmt: skip
    if tier == "torch" and unwatched(q_nope, q_rope, latent, scale, rope):
        return MlaDecoded(*forward(q_nope, q_rope, kv_cache, block_table, cache_seqlens, softmax_scale))
    return MlaDecoded(
        *_mla_decode(q_nope, q_rope, latent, scale, rope, block_table, cache_seqlens, softmax_scale, tier == "fused")
    )


def reference(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor | Float8Cache,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor,
    softmax_scale: float,
) -> MlaDecoded:
    """The definition: one sequence after the other, products in the dtype of the queries, the softmax in float32."""
    num_sequences, num_queries, num_heads, latent_width = q_nope.shape
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    out = torch.zeros_like(q_nope)
    lse = q_nope.new_full((num_sequences, num_queries, num_heads), -torch.inf, dtype=wide)
    for b, length in enumerate(lengths_of(kv_cache, block_table, cache_seqlens)):
        kv_SW = tokens(kv_cache, block_table, slice(b, b + 1), length, q_nope.dtype)[0]
        latent_SC, rope_SR = kv_SW.tensor_split([latent_width], dim=-1)
        scores_THS = torch.einsum("thc,sc->ths", q_nope[b], latent_SC) + torch.einsum("thr,sr->ths", q_rope[b], rope_SR)
        hidden_T1S = hidden(num_queries, length, q_nope.device).unsqueeze(1)
        logits_THS = (scores_THS.to(wide) * softmax_scale).masked_fill(hidden_T1S, -torch.inf)
        lse[b] = logits_THS.logsumexp(dim=-1)
        weights_THS = logits_THS.softmax(dim=-1).masked_fill(hidden_T1S, 0.0)  # not NaN where a query sees nothing
        out[b] = torch.einsum("ths,sc->thc", weights_THS.to(q_nope.dtype), latent_SC)
    return MlaDecoded(out, lse)


def hidden(num_queries: int, length: int, device: torch.device) -> Tensor:
    """[T, S], True where a token comes after the query."""
    position_T1 = length - num_queries + torch.arange(num_queries, device=device).unsqueeze(1)
    return torch.arange(length, device=device) > position_T1


def lengths_of(kv_cache: Tensor | Float8Cache, block_table: Tensor | None, cache_seqlens: Tensor) -> list[int]:
    """The tokens of every sequence; none, and no page, may lie outside the cache. Without values, all that it holds."""
    pages = kv_cache.latent if isinstance(kv_cache, Float8Cache) else kv_cache
    most = pages.shape[1] if block_table is None else block_table.shape[1] * pages.shape[1]
    if cache_seqlens.is_meta:
        return [most] * len(cache_seqlens)
    lengths = cache_seqlens.tolist()
    if not all(0 <= length <= most for length in lengths):
        raise ValueError(f"cache_seqlens {lengths} must lie in 0..{most} (tokens that a sequence has room for)")
    if block_table is not None and max(lengths, default=0) > 0:
        first_token_P = torch.arange(block_table.shape[1], device=block_table.device) * pages.shape[1]
        used = block_table[first_token_P < cache_seqlens[:, None]]
        lowest, highest = (int(page) for page in used.aminmax())
        if not 0 <= lowest <= highest < len(pages):
            raise ValueError(f"block_table names pages {lowest}..{highest} of {len(pages)}")
    return lengths


def tokens(
    kv_cache: Tensor | Float8Cache, block_table: Tensor | None, sequences: slice, length: int, dtype: torch.dtype
) -> Tensor:
    """[b, length, W], what is cached of some sequences with as many tokens each."""

    def gathered(cached: Tensor) -> Tensor:
        if block_table is None:
            return cached[sequences, :length]
        pages = block_table[sequences, : -(-length // cached.shape[1])]
        return cached[pages].flatten(1, 2)[:, :length]

    if not isinstance(kv_cache, Float8Cache):
        return gathered(kv_cache)
    latent, scale, rope = (gathered(part) for part in kv_cache)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.cat((dequantize(latent, scale, dtype=wide).to(dtype), rope.to(dtype)), dim=-1)


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor | Float8Cache,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """The fast torch form: the M rows of a sequence read one key, which is its own value; equal lengths go together."""
    num_sequences, num_queries, num_heads, latent_width = q_nope.shape
    lengths = lengths_of(kv_cache, block_table, cache_seqlens)
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    if 0 in q_nope.shape[:3]:
        return torch.zeros_like(q_nope), q_nope.new_zeros(q_nope.shape[:3], dtype=wide)
    query_BMW, parts = torch.cat((q_nope, q_rope), dim=-1).flatten(1, 2), []
    together = num_sequences if len(set(lengths)) == 1 else 1
    for b in range(0, num_sequences, together):
        kv_BSW = tokens(kv_cache, block_table, slice(b, b + together), lengths[b], q_nope.dtype)
        parts.append(_attend_to_last(query_BMW[b : b + together], kv_BSW, num_queries, softmax_scale))
    mixed_BMW, lse_BM = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    out = mixed_BMW[..., :latent_width].unflatten(1, (num_queries, num_heads))
    return out.contiguous(), lse_BM.unflatten(1, (num_queries, num_heads))


def _attend_to_last(query: Tensor, kv: Tensor, num_queries: int, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """[B, M, W] and [B, M] of query [B, M, W], rows of the last `num_queries` tokens of kv [B, S, W]."""
    num_rows, length = query.shape[1], kv.shape[1]
    early = max(0, num_queries - length) * (num_rows // num_queries)  # rows before the first token see nothing
    attend = _attend_by_blocks if query.itemsize == 2 else _attend
    if early == 0:
        return attend(query, kv, hidden_rows(num_queries, num_rows, length, query.device), softmax_scale)
    mixed, wide = torch.zeros_like(query), torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=wide)
    if early < num_rows:
        later_MS = hidden_rows(length, num_rows - early, length, query.device)
        mixed[:, early:], lse[:, early:] = attend(query[:, early:], kv, later_MS, softmax_scale)
    return mixed, lse


def hidden_rows(num_queries: int, num_rows: int, length: int, device: torch.device) -> Tensor | None:
    """[M, S], True where a token comes after the row's query. None: nowhere."""
    if num_queries == 1:
        return None
    return hidden(num_queries, length, device).repeat_interleave(num_rows // num_queries, dim=0)


def _attend(query: Tensor, kv: Tensor, later: Tensor | None, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """[B, M, W] and [B, M] of query [B, M, W] and kv [B, S, W]; where `later` [M, S] is True nothing is seen."""
    logits_BMS = torch.bmm(query, kv.mT).mul_(softmax_scale)
    if later is not None:
        logits_BMS.masked_fill_(later, -torch.inf)
    log_weights_BMS = logits_BMS.log_softmax(-1)
    lse_BM = logits_BMS.amax(-1) - log_weights_BMS.amax(-1)  # the second is small, so little of it is rounded away
    return torch.bmm(log_weights_BMS.exp_(), kv), lse_BM


def _attend_by_blocks(query: Tensor, kv: Tensor, later: Tensor | None, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """The same by torch's flash form, which keeps products of 16 bits in float32; its statistics are float32."""
    kv_B1SW = kv.unsqueeze(1)
    if kv_B1SW.stride(-1) != 1:  # what is called below takes it for granted
        kv_B1SW = kv_B1SW.contiguous()
    mask = None if later is None else query.new_zeros(later.shape).masked_fill_(later, -torch.inf)
    mixed_B1MW, lse_B1M = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(1), kv_B1SW, kv_B1SW, attn_mask=mask, scale=softmax_scale
    )
    return mixed_B1MW[:, 0], lse_B1M[:, 0]


@torch.library.custom_op("workbench_kernels::mla_decode", mutates_args=())
def _mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    scale: Tensor | None,
    rope: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and lse; without scale and rope, `latent` is the whole cache in 16 bits or more."""
    if not fused:
        kv_cache = latent if scale is None or rope is None else Float8Cache(latent, scale, rope)
        return forward(q_nope, q_rope, kv_cache, block_table, cache_seqlens, softmax_scale)
    from workbench_kernels.fused import mla_decode as twin

    if rope is None:
        latent, rope = latent.tensor_split([q_nope.shape[-1]], dim=-1)
    return twin.forward(q_nope, q_rope, latent, scale, rope, block_table, cache_seqlens, softmax_scale)


@_mla_decode.register_fake
def _(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    scale: Tensor | None,
    rope: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    return q_nope.new_empty(q_nope.shape), q_nope.new_empty(q_nope.shape[:3], dtype=wide)


def _check_queries(q_nope: Tensor, q_rope: Tensor) -> None:
    shapes = f"q_nope {list(q_nope.shape)}, q_rope {list(q_rope.shape)}"
    if q_nope.ndim != 4 or q_rope.ndim != 4 or q_nope.shape[:3] != q_rope.shape[:3] or q_nope.shape[3] == 0:
        raise ValueError(f"{shapes} must be [B, T, H, C] and [B, T, H, R] with C > 0")
    if q_nope.dtype != q_rope.dtype or not q_nope.is_floating_point():
        raise ValueError(f"q_nope ({q_nope.dtype}) and q_rope ({q_rope.dtype}) must have one floating dtype")


def _check_cache(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor) -> None:
    width = q_nope.shape[-1] + q_rope.shape[-1]
    if kv_cache.ndim != 3 or kv_cache.shape[-1] != width or kv_cache.dtype != q_nope.dtype:
        raise ValueError(
            f"kv_cache ({kv_cache.dtype} {list(kv_cache.shape)}) must be {q_nope.dtype} [..., ..., C + R = {width}], "
            "or a Float8Cache"
        )


def _check_float8(q_nope: Tensor, q_rope: Tensor, latent: Tensor, scale: Tensor, rope: Tensor) -> None:
    widths = {"latent": q_nope.shape[-1], "scale": -(-q_nope.shape[-1] // WIDTH), "rope": q_rope.shape[-1]}
    for (name, width), part in zip(widths.items(), (latent, scale, rope), strict=True):
        if part.ndim != 3 or part.shape[:2] != latent.shape[:2] or part.shape[2] != width:
            raise ValueError(
                f"kv_cache.{name} {list(part.shape)} must be [..., ..., {width}], as latent and queries are"
            )
    if latent.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or not rope.is_floating_point():
        raise ValueError(
            f"kv_cache.latent ({latent.dtype}) must be torch.float8_e4m3fn, kv_cache.scale ({scale.dtype}) "
            f"torch.float32 and kv_cache.rope ({rope.dtype}) floating"
        )


def _check_lengths(num_sequences: int, cached: Tensor, block_table: Tensor | None, cache_seqlens: Tensor) -> None:
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.shape != (num_sequences,):
        raise ValueError(
            f"cache_seqlens ({cache_seqlens.dtype} {list(cache_seqlens.shape)}) must be torch.int32 [{num_sequences}]"
        )
    if block_table is None:
        if cached.shape[0] != num_sequences:
            raise ValueError(f"kv_cache {list(cached.shape)} without block_table must be of {num_sequences} sequences")
    elif block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.shape[0] != num_sequences:
        raise ValueError(
            f"block_table ({block_table.dtype} {list(block_table.shape)}) must be torch.int32 [{num_sequences}, pages]"
        )
    elif cached.shape[1] == 0 or (block_table.numel() > 0 and cached.shape[0] == 0):
        raise ValueError(f"kv_cache {list(cached.shape)} must have pages, of at least one token each")
