"""The lightning indexer: a small, cheap attention whose scores say which keys the large one shall read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.blocks.rope import Rotation, rotate_halves
from workbench_kernels.sparse_select import SparseSelection, sparse_select


class LightningIndexer(nn.Module):
    """Score every key for every query, and choose keys: H heads of width K of its own, all reading one shared key.

    Of each head the first `qk_rope_head_dim` numbers turn, in the half layout, and the others do not; in the attention
    that it serves the turning part comes last, and its pairs are neighbours. DeepSeek's code also multiplies queries
    and keys by a Hadamard matrix, to spread outliers before it rounds them to 8 bits. The matrix is orthogonal and
    changes no product of the two, and nothing is rounded here: we leave it out. Scores are float32 or wider.

    Source: DeepSeek-V3.2-Exp report, section 1, equation 1.
    """

    def __init__(
        self, hidden_size: int, index_n_heads: int, *, index_head_dim: int, q_lora_rank: int, qk_rope_head_dim: int
    ) -> None:
        super().__init__()
        self.head_widths = (qk_rope_head_dim, index_head_dim - qk_rope_head_dim)
        self.wq_b = nn.Linear(q_lora_rank, index_n_heads * index_head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, index_n_heads, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        compressed_query: Float[Tensor, "B T rank"],
        index_key: Float[Tensor, "B S K"],
        turn: Rotation,
        *,
        index_topk: int,
    ) -> SparseSelection:
        """Scores of S keys for the T tokens of `x`, whose queries are made of `compressed_query`; future keys too.

        The `index_topk` visible keys that score highest are chosen.

        Raises:
            ValueError: `index_topk` is below 1.
        """
        head_width = index_key.shape[-1]
        query_BTHK = self.turned(self.wq_b(compressed_query).unflatten(-1, (-1, head_width)), turn)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight_BTH = F.linear(x.to(wide), self.weights_proj.weight.to(wide))
        scale = (head_width * weight_BTH.shape[-1]) ** -0.5
        return sparse_select(query_BTHK, index_key, weight_BTH * scale, index_topk=index_topk)

    def key(self, x: Float[Tensor, "B T D"], turn: Rotation) -> Float[Tensor, "B T K"]:
        """What the cache keeps of the T tokens: one key each, shared by all index heads."""
        return self.turned(self.k_norm(self.wk(x)).unsqueeze(2), turn).squeeze(2)

    def turned(self, heads: Float[Tensor, "B T H K"], turn: Rotation) -> Float[Tensor, "B T H K"]:
        """The heads with their first part turned to its position."""
        rope_BTHR, nope_BTHK = heads.split(self.head_widths, dim=-1)
        return torch.cat((rotate_halves(rope_BTHR, turn), nope_BTHK), dim=-1)


def as_mask(keys: Int[Tensor, "B T Y"], num_keys: int) -> Bool[Tensor, "B T {num_keys}"]:
    """True at the keys that were chosen, False at all others; -1 stands for none."""
    # The places that hold no key all point to one more column, which is cut off.
    columns_BTS = torch.zeros(*keys.shape[:2], num_keys + 1, dtype=torch.bool, device=keys.device)
    return columns_BTS.scatter(-1, keys % (num_keys + 1), True)[..., :num_keys]
