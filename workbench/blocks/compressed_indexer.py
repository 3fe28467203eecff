"""The lightning indexer over compressed entries: small heads that decide which entries a query reads."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.blocks.compressed_cache import PoolCache
from workbench.blocks.compressor import Entries, Pool, closed
from workbench.blocks.rope import Rotation
from workbench.blocks.trailing_rope import rotate_trailing
from workbench_kernels.moe_route import best


class IndexScorer(nn.Module):
    """Sum over heads of weight * relu(query . key), with weights that depend on the token; float32 or wider.

    The two scales, width^-1/2 and heads^-1/2, change no choice.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.1; DeepSeek-V3.2, section 2.1 (the indexer over tokens).
    """

    def __init__(self, hidden_size: int, index_n_heads: int) -> None:
        super().__init__()
        self.weights_proj = nn.Linear(hidden_size, index_n_heads, bias=False)

    def forward(
        self, query: Float[Tensor, "B T H K"], key: Float[Tensor, "B S K"], x: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T S"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        num_heads, width = query.shape[2:]
        scores_BTHS = torch.einsum("bthk,bsk->bths", query.to(wide), key.to(wide)).relu() * width**-0.5
        weights_BTH = self.weights_proj(x).to(wide) * num_heads**-0.5
        return torch.einsum("bths,bth->bts", scores_BTHS, weights_BTH)


class LightningIndexer(Pool):
    """Scores of all entries for each of T queries; it pools index keys of its own from the same windows.

    Its queries are made from the attention's compressed query, its keys turn like the entries.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.1.
    """

    def __init__(
        self,
        hidden_size: int,
        index_head_dim: int,
        *,
        q_lora_rank: int,
        index_n_heads: int,
        compress_ratio: int,
        eps: float,
    ) -> None:
        super().__init__(hidden_size, index_head_dim, compress_ratio=compress_ratio, overlaps=True, eps=eps)
        self.index_head_dim = index_head_dim
        self.q_b_proj = nn.Linear(q_lora_rank, index_n_heads * index_head_dim, bias=False)
        self.scorer = IndexScorer(hidden_size, index_n_heads)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T C"],
        turn: Rotation,
        cache: PoolCache | None = None,
    ) -> Float[Tensor, "B T S"]:
        key_BSK = self.pool(x, turn, cache)
        query_BTHK = self.q_b_proj(query_latent).unflatten(-1, (-1, self.index_head_dim))
        return self.scorer(rotate_trailing(query_BTHK, turn), key_BSK, x)


class SparseCompressor(Pool):
    """Overlapping entries, of which a query reads the `index_topk` with the highest index scores.

    The choice passes no gradient: the indexer learns only from a loss on `Entries.scores`.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.1.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        *,
        q_lora_rank: int,
        compress_ratio: int,
        index_n_heads: int,
        index_head_dim: int,
        index_topk: int,
        eps: float,
    ) -> None:
        super().__init__(hidden_size, head_dim, compress_ratio=compress_ratio, overlaps=True, eps=eps)
        if index_topk < 1:
            raise ValueError(f"index_topk={index_topk} must be at least 1")
        self.index_topk = index_topk
        self.indexer = LightningIndexer(
            hidden_size,
            index_head_dim,
            q_lora_rank=q_lora_rank,
            index_n_heads=index_n_heads,
            compress_ratio=compress_ratio,
            eps=eps,
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T C"],
        turn: Rotation,
        cache: PoolCache | None = None,
        index_cache: PoolCache | None = None,
    ) -> Entries:
        first = 0 if cache is None else cache.length
        key_BSK = self.pool(x, turn, cache)
        scores_BTS = self.indexer(x, query_latent, turn, index_cache)
        closed_TS = closed(first, x.shape[1], key_BSK.shape[1], self.compress_ratio, x.device)
        return Entries(key_BSK, chosen(scores_BTS, closed_TS, self.index_topk), scores_BTS)


def chosen(scores: Float[Tensor, "B T S"], closed: Bool[Tensor, "T S"], index_topk: int) -> Bool[Tensor, "B T S"]:
    """True for the `index_topk` best closed entries of every query, or for all where fewer have closed.

    Of equals the lowest index: relu makes many scores exactly 0, and a choice among them that depended on how many
    entries there are would make cached and full passes differ.
    """
    masked_BTS = scores.masked_fill(~closed, -torch.inf)
    picked_NA = best(masked_BTS.flatten(0, 1), min(index_topk, scores.shape[-1]))
    picked_NS = torch.zeros_like(scores, dtype=torch.bool).flatten(0, 1).scatter(1, picked_NA, True)
    return picked_NS.view_as(scores) & closed
