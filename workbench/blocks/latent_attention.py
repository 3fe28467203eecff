"""Multi-head latent attention (MLA): keys and values of all heads rebuilt from one narrow latent per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.blocks.cache import LatentCache
from workbench.blocks.float8_latent_cache import Float8LatentCache
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench_kernels import Float8Cache, mla_decode
from workbench_kernels.mla_attention import join_by_head, mla_attention


class LatentQuery(NamedTuple):
    """The two parts of every query head: one matched against content, one against position."""

    nope: Float[Tensor, "B T H K"]
    rope: Float[Tensor, "B T H R"]


class LatentProjections(nn.Module):
    """The weights of latent attention, and what they make of each token; which keys are read is a subclass's matter.

    `q_lora_rank=None` leaves queries uncompressed. The softmax scale belongs to the decompressed width
    (qk_nope_head_dim + qk_rope_head_dim), in the absorbed form as well.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        softmax_scale: float,
        rotate: Callable[[Tensor, Rotation], Tensor],
    ) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query_widths = (qk_nope_head_dim, qk_rope_head_dim)
        self.latent_widths = (kv_lora_rank, qk_rope_head_dim)
        self.v_head_dim = v_head_dim
        self.softmax_scale = softmax_scale
        self.rotate = rotate
        query_width = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank)
            self.q_b_proj = nn.Linear(q_lora_rank, query_width, bias=False)
        self.compresses_query = q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_attention_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=False)

    def compressed_query(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T rank"]:
        """What queries are made of: the normed low-rank form of x, or x itself where they are uncompressed."""
        return self.q_a_layernorm(self.q_a_proj(x)) if self.compresses_query else x

    def query(self, compressed: Float[Tensor, "B T rank"], turn: Rotation) -> LatentQuery:
        """The queries of the T tokens, their positional part rotated."""
        flat = self.q_b_proj(compressed) if self.compresses_query else self.q_proj(compressed)
        nope_BTHK, rope_BTHR = flat.unflatten(-1, (self.num_attention_heads, -1)).split(self.query_widths, dim=-1)
        return LatentQuery(nope_BTHK, self.rotate(rope_BTHR, turn))

    def latent(
        self, x: Float[Tensor, "B T D"], turn: Rotation
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T R"]]:
        """What the cache keeps of the T tokens: the normed latent and the rotated key shared by all heads."""
        latent_BTC, key_rope_BTR = self.kv_a_proj_with_mqa(x).split(self.latent_widths, dim=-1)
        return self.kv_a_layernorm(latent_BTC), self.rotate(key_rope_BTR.unsqueeze(2), turn).squeeze(2)

    def up(self) -> Float[Tensor, "H X C"]:
        """The up-projection by head: of its X rows the first K make keys from the latent, the others values."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_attention_heads, -1))


class LatentAttention(LatentProjections):
    """Causal attention whose cache holds the latent and one shared positional key instead of keys and values."""

    def forward(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: LatentCache | Float8LatentCache | None = None
    ) -> Float[Tensor, "B T D"]:
        query = self.query(self.compressed_query(x), turn)
        latent_BTC, key_rope_BTR = self.latent(x, turn)
        up, scale = self.up(), self.softmax_scale
        if cache is not None:
            cache.append(latent_BTC, key_rope_BTR)
        if cache is None:
            mixed_BTHU = naive_attention(query, latent_BTC, key_rope_BTR, up, scale=scale)
        elif x.shape[1] == 1:  # cheaper to match against the latents than to decompress the whole past for
            mixed_BTHU = absorbed_attention(query, cache.packed(x.dtype), up, scale=scale)
        else:
            mixed_BTHU = naive_attention(query, *cache.parts(x.dtype), up, scale=scale)
        return self.o_proj(mixed_BTHU.flatten(-2))


def naive_attention(
    query: LatentQuery,
    latent: Float[Tensor, "B S C"],
    key_rope: Float[Tensor, "B S R"],
    up: Float[Tensor, "H X C"],
    *,
    scale: float,
) -> Float[Tensor, "B T H U"]:
    """Decompress every head's keys and values from the latent, then attend.

    Of the X rows of `up` per head, the first K make keys and the other U values.
    """
    key_nope_BSHK, value_BSHU = _by_content(latent, up, key_width=query.nope.shape[-1])
    return mla_attention(query.nope, query.rope, key_nope_BSHK, key_rope, value_BSHU, scale)


def decompress(
    latent: Float[Tensor, "B S C"], key_rope: Float[Tensor, "B S R"], up: Float[Tensor, "H X C"], *, key_width: int
) -> tuple[Float[Tensor, "B S H K"], Float[Tensor, "B S H U"]]:
    """Every head's keys, content and position side by side, and its values; `key_width` is that of the content."""
    key_nope_BSHK, value_BSHU = _by_content(latent, up, key_width=key_width)
    shared_BSHR = key_rope.unsqueeze(2).expand(-1, -1, up.shape[0], -1)
    return join_by_head(key_nope_BSHK, shared_BSHR), value_BSHU


def _by_content(
    latent: Float[Tensor, "B S C"], up: Float[Tensor, "H X C"], *, key_width: int
) -> tuple[Float[Tensor, "B S H K"], Float[Tensor, "B S H U"]]:
    """The part of every head's keys that the latent makes, and its values."""
    key_value_BSHX = (latent @ up.flatten(0, 1).mT).unflatten(-1, up.shape[:2])
    key_nope_BSHK, value_BSHU = key_value_BSHX.split((key_width, up.shape[1] - key_width), dim=-1)
    return key_nope_BSHK, value_BSHU


def absorbed_attention(
    query: LatentQuery, kv_cache: Float[Tensor, "B S width"] | Float8Cache, up: Float[Tensor, "H X C"], *, scale: float
) -> Float[Tensor, "B T H U"]:
    """The same attention without decompressing: the up-projections move over to the query and to the mixed latent.

    All heads then read one shared key/value of width C + R, as in multi-query attention; of latents and positional
    keys side by side, or in FP8.
    """
    num_sequences, num_queries, _, key_width = query.nope.shape
    up_key_HKC, up_value_HUC = up.split((key_width, up.shape[1] - key_width), dim=1)
    query_HNC = torch.bmm(query.nope.flatten(0, 1).transpose(0, 1), up_key_HKC)
    query_BTHC = query_HNC.unflatten(1, (num_sequences, num_queries)).permute(1, 2, 0, 3)
    kept = kv_cache.latent if isinstance(kv_cache, Float8Cache) else kv_cache
    cache_seqlens = torch.full((num_sequences,), kept.shape[1], dtype=torch.int32, device=kept.device)
    mixed_BTHC, _ = mla_decode(query_BTHC, query.rope, kv_cache, cache_seqlens=cache_seqlens, softmax_scale=scale)
    mixed_HNC = mixed_BTHC.flatten(0, 1).transpose(0, 1)
    return torch.bmm(mixed_HNC, up_value_HUC.mT).transpose(0, 1).unflatten(0, (num_sequences, num_queries))
