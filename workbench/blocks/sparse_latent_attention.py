"""DeepSeek sparse attention (DSA): latent attention to those past tokens that a lightning indexer scores highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.blocks.cache import LatentCache
from workbench.blocks.latent_attention import LatentProjections, LatentQuery, decompress, join_by_head
from workbench.blocks.lightning_indexer import LightningIndexer, as_mask
from workbench.blocks.rope import Rotation


class SparseAttention(NamedTuple):
    """What a sparse attention gives, and what `indexer_loss` and a picture of it need.

    `index_scores` are finite for keys in the future too; `selected` is False there. `attention` is the mean over heads
    of the weights: 0 where not selected, and each query's sum is 1.
    """

    hidden: Float[Tensor, "B T D"]
    index_scores: Float[Tensor, "B T S"]
    selected: Bool[Tensor, "B T S"]
    attention: Float[Tensor, "B T S"]


class SparseLatentAttention(LatentProjections):
    """Latent attention in which each query reads the `index_topk` keys that `indexer` scores highest.

    The indexer reads detached inputs, and the choice passes no gradient: the language-model loss trains all weights
    but the indexer's, `indexer_loss` those and no others. With `index_topk` no less than the sequence's length this is
    plain latent attention, which is how the indexer's dense warm-up runs.

    Source: DeepSeek-V3.2-Exp report, section 1, equations 1 and 2, and section 2.1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        softmax_scale: float,
        rotate: Callable[[Tensor, Rotation], Tensor],
        index_n_heads: int,
        index_head_dim: int,
        index_topk: int,
    ) -> None:
        super().__init__(
            hidden_size,
            num_attention_heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            softmax_scale=softmax_scale,
            rotate=rotate,
        )
        self.index_topk = index_topk
        self.indexer = LightningIndexer(
            hidden_size,
            index_n_heads,
            index_head_dim=index_head_dim,
            q_lora_rank=q_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
        )

    def forward(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: SparseLatentCache | None = None
    ) -> SparseAttention:
        compressed_BTC = self.compressed_query(x)
        latent_BSC, key_rope_BSR = self.latent(x, turn)
        index_key_BSK = self.indexer.key(x.detach(), turn)
        if cache is not None:
            latent_BSC, key_rope_BSR, index_key_BSK = cache.append(latent_BSC, key_rope_BSR, index_key_BSK)
        scores_BTS, keys_BTY = self.indexer(
            x.detach(), compressed_BTC.detach(), index_key_BSK, turn, index_topk=self.index_topk
        )
        # Gathering costs a copy of the latents per query: for one new token less than decompressing the whole past.
        attend = gathered_attention if x.shape[1] == 1 else masked_attention
        query = self.query(compressed_BTC, turn)
        mixed_BTHU, attention_BTS = attend(
            query, latent_BSC, key_rope_BSR, self.up(), keys_BTY, scale=self.softmax_scale
        )
        selected_BTS = as_mask(keys_BTY, scores_BTS.shape[-1])
        return SparseAttention(self.o_proj(mixed_BTHU.flatten(-2)), scores_BTS, selected_BTS, attention_BTS)


def masked_attention(
    query: LatentQuery,
    latent: Float[Tensor, "B S C"],
    key_rope: Float[Tensor, "B S R"],
    up: Float[Tensor, "H X C"],
    keys: Int[Tensor, "B T Y"],
    *,
    scale: float,
) -> tuple[Float[Tensor, "B T H U"], Float[Tensor, "B T S"]]:
    """Decompress all keys and values, match all of them, and drop those that are not among `keys`.

    Returns the mixed values of each head, and the weights' mean over heads.
    """
    key_BSHK, value_BSHU = decompress(latent, key_rope, up, key_width=query.nope.shape[-1])
    scores_BHTS = torch.einsum("bthk,bshk->bhts", join_by_head(query.nope, query.rope), key_BSHK) * scale
    dropped_B1TS = ~as_mask(keys, latent.shape[1]).unsqueeze(1)
    weights_BHTS = softmax_without(scores_BHTS, dropped_B1TS)
    mixed_BTHU = torch.einsum("bhts,bshu->bthu", weights_BHTS.to(latent.dtype), value_BSHU)
    return mixed_BTHU, weights_BHTS.mean(1)


def gathered_attention(
    query: LatentQuery,
    latent: Float[Tensor, "B S C"],
    key_rope: Float[Tensor, "B S R"],
    up: Float[Tensor, "H X C"],
    keys: Int[Tensor, "B T Y"],
    *,
    scale: float,
) -> tuple[Float[Tensor, "B T H U"], Float[Tensor, "B T S"]]:
    """The same, reading the latents of `keys` alone, in the absorbed form (`latent_attention.absorbed_attention`)."""
    key_width = query.nope.shape[-1]
    up_key_HKC, up_value_HUC = up.split((key_width, up.shape[1] - key_width), dim=1)
    latent_BTYC, key_rope_BTYR = read(latent, keys), read(key_rope, keys)
    query_BTHC = torch.einsum("bthk,hkc->bthc", query.nope, up_key_HKC)
    scores_BHTY = torch.einsum("bthc,btyc->bhty", query_BTHC, latent_BTYC)
    scores_BHTY = (scores_BHTY + torch.einsum("bthr,btyr->bhty", query.rope, key_rope_BTYR)) * scale
    weights_BHTY = softmax_without(scores_BHTY, (keys < 0).unsqueeze(1))
    mixed_BTHC = torch.einsum("bhty,btyc->bthc", weights_BHTY.to(latent.dtype), latent_BTYC)
    mean_BTY = weights_BHTY.mean(1)
    # Places without a key have weight 0 and may be added anywhere.
    attention_BTS = mean_BTY.new_zeros(*keys.shape[:2], latent.shape[1]).scatter_add(-1, keys.clamp(min=0), mean_BTY)
    return torch.einsum("bthc,huc->bthu", mixed_BTHC, up_value_HUC), attention_BTS


def read(kept: Float[Tensor, "B S width"], keys: Int[Tensor, "B T Y"]) -> Float[Tensor, "B T Y width"]:
    """The rows of `kept` that each query chose; -1 gives row 0, for the caller to ignore."""
    sequence_B11 = torch.arange(len(kept), device=kept.device)[:, None, None]
    return kept[sequence_B11, keys.clamp(min=0)]


def softmax_without(scores: Float[Tensor, "B H T Y"], dropped: Bool[Tensor, "B 1 T Y"]) -> Float[Tensor, "B H T Y"]:
    """Softmax over the last axis, float32 or wider, with weight 0 where `dropped`."""
    statistics = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(dropped, -torch.inf).softmax(-1, dtype=statistics)


class SparseLatentCache:
    """The latents and positional keys of latent attention, and the indexer's key: C + R + K numbers per token.

    The indexer's key has a width K of its own.

    Raises:
        ValueError: more tokens are appended than `max_length`.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        index_head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.latents = LatentCache(
            batch_size,
            max_length,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            dtype=dtype,
            device=device,
        )
        self.index_key = torch.zeros(batch_size, max_length, index_head_dim, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Tokens kept so far."""
        return self.latents.length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.latents.truncate(length)

    def append(
        self, latent: Float[Tensor, "B T C"], key_rope: Float[Tensor, "B T R"], index_key: Float[Tensor, "B T K"]
    ) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S R"], Float[Tensor, "B S K"]]:
        """Store what belongs to the next T tokens; returns what belongs to all tokens so far."""
        first = self.length
        self.latents.append(latent, key_rope)
        self.index_key[:, first : self.length] = index_key
        return *self.latents.parts(latent.dtype), self.index_key[:, : self.length].to(index_key.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.latents.nbytes + self.index_key.nbytes
