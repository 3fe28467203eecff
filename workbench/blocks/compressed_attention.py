"""Compressed attention (DeepSeek-V4): the last tokens one by one, everything before in compressed entries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.blocks.compressed_cache import CompressedCache
from workbench.blocks.compressed_indexer import SparseCompressor
from workbench.blocks.compressor import Entries, HeavyCompressor
from workbench.blocks.keep_wide import KeepWide
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench.blocks.trailing_rope import backward, rotate_trailing
from workbench.blocks.unit_norm import unit_rms
from workbench_kernels.causal_attention import visible


class CompressedAttention(KeepWide):
    """Causal attention to `sliding_window` tokens and to the entries of `compressor` (None: the window alone).

    One head is key and value for all query heads. Queries and that head are normalised and their last numbers turned,
    as many as `turn` has angles for; the output is turned back by the query's position. `turn` belongs to the T tokens
    alone: an entry takes the rotation of its window's first token, which is one of these or in the cache. The output
    projection is low-rank, its first matrix block-diagonal over `o_groups` groups of heads.

    Raises:
        ValueError: `o_groups` does not divide `num_attention_heads`.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.
    """

    keep_wide = ("sinks",)

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        head_dim: int,
        q_lora_rank: int,
        o_groups: int,
        o_lora_rank: int,
        sliding_window: int,
        softmax_scale: float,
        compressor: HeavyCompressor | SparseCompressor | None,
        eps: float,
    ) -> None:
        super().__init__()
        if num_attention_heads % o_groups:
            raise ValueError(f"o_groups={o_groups} must divide num_attention_heads={num_attention_heads}")
        self.head_dim = head_dim
        self.o_groups = o_groups
        self.sliding_window = sliding_window
        self.softmax_scale = softmax_scale
        self.eps = eps
        self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(q_lora_rank, eps=eps)
        self.q_b_proj = nn.Linear(q_lora_rank, num_attention_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.kv_norm = RMSNorm(head_dim, eps=eps)
        self.o_a_proj = nn.Linear(num_attention_heads * head_dim // o_groups, o_groups * o_lora_rank, bias=False)
        self.o_b_proj = nn.Linear(o_groups * o_lora_rank, hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(num_attention_heads))
        self.compressor = compressor

    def forward(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: CompressedCache | None = None
    ) -> Float[Tensor, "B T D"]:
        query_latent_BTC = self.q_a_norm(self.q_a_proj(x))
        query_BTHK = unit_rms(self.q_b_proj(query_latent_BTC).unflatten(-1, (-1, self.head_dim)), self.eps)
        query_BTHK = rotate_trailing(query_BTHK, turn)
        key_BSK = rotate_trailing(self.kv_norm(self.kv_proj(x)).unsqueeze(2), turn).squeeze(2)
        if cache is not None:
            key_BSK = cache.append(key_BSK)
        near_TS = visible(x.shape[1], key_BSK.shape[1], x.device, window=self.sliding_window)
        read_BTS = near_TS.expand(x.shape[0], -1, -1)
        entries = self.entries(x, query_latent_BTC, turn, cache)
        if entries is not None:
            key_BSK = torch.cat((key_BSK, entries.key), dim=1)
            read_BTS = torch.cat((read_BTS, entries.read), dim=-1)
        mixed_BTHK = sink_attention(query_BTHK, key_BSK, read_BTS, self.sinks, scale=self.softmax_scale)
        mixed_BTHK = rotate_trailing(mixed_BTHK, backward(turn))
        return self.o_b_proj(grouped_linear(mixed_BTHK.flatten(-2), self.o_a_proj.weight, self.o_groups))

    def entries(
        self,
        x: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T C"],
        turn: Rotation,
        cache: CompressedCache | None = None,
    ) -> Entries | None:
        """The compressed past and what each query reads of it; None without a compressor."""
        kept, kept_index = (None, None) if cache is None else (cache.compressor, cache.indexer)
        match self.compressor:
            case HeavyCompressor():
                return self.compressor(x, turn, kept)
            case SparseCompressor():
                return self.compressor(x, query_latent, turn, kept, kept_index)
            case _:
                return None


def sink_attention(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B S K"],
    read: Bool[Tensor, "B T S"],
    sinks: Float[Tensor, " H"],
    *,
    scale: float,
) -> Float[Tensor, "B T H K"]:
    """Attention of every head to one shared head of keys, which are the values too, where `read` is True.

    Each head's sink is one more logit in the softmax with nothing to give: it takes weight, so that a head that finds
    nothing can stay silent. Statistics are float32 or wider.

    Source: Xiao et al., arXiv 2309.17453 (sinks); DeepSeek-V4, arXiv 2606.19348, section 2.3.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores_BHTS = torch.einsum("bthk,bsk->bhts", query, key).to(wide) * scale
    scores_BHTS = scores_BHTS.masked_fill(~read.unsqueeze(1), -torch.inf)
    sinks_BHT1 = sinks.to(wide)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
    weights_BHTS = torch.cat((scores_BHTS, sinks_BHT1), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhts,bsk->bthk", weights_BHTS.to(key.dtype), key)


def grouped_linear(
    x: Float[Tensor, "B T in_features"], weight: Float[Tensor, "out_features X"], num_groups: int
) -> Float[Tensor, "B T out_features"]:
    """A linear map whose matrix is block-diagonal: each of `num_groups` parts of `x` makes its part of the output.

    `weight` holds the blocks one below the other.
    """
    by_group = (num_groups, -1)
    return torch.einsum("btgx,gcx->btgc", x.unflatten(-1, by_group), weight.unflatten(0, by_group)).flatten(-2)
