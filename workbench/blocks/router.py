"""The router: which experts a token visits, and with what weight."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.keep_wide import KeepWide
from workbench.blocks.scoring import ScoringFunction, expert_scores


class Routing(NamedTuple):
    """One layer's choice for N tokens: `scores` are unbiased, `load` counts the tokens that chose each expert."""

    indices: Int[Tensor, "N A"]
    weights: Float[Tensor, "N A"]
    scores: Float[Tensor, "N E"]
    load: Int[Tensor, " E"]


class Router(KeepWide):
    """Choose `num_experts_per_tok` of `n_routed_experts` experts for every token.

    The selection bias moves the choice and never the mixture: weights come from the unbiased scores. It is a buffer
    that stays float32 or wider and takes no gradient; `balance.updated_bias` moves it. `bias=True` adds a learned bias
    to the logits, which is part of the scores (gpt-oss). With groups, a token first keeps `topk_group` of `n_group`
    groups: those with the best two experts (`group_score="top2"`, V3) or the best single one (`"max"`, V2). All of this
    is computed in float32 or wider.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; DeepSeek-V2, arXiv 2405.04434, section 2.2.
    """

    keep_wide = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        *,
        num_experts_per_tok: int,
        scoring_func: ScoringFunction,
        n_group: int,
        topk_group: int,
        group_score: Literal["max", "top2"],
        norm_topk_prob: bool,
        routed_scaling_factor: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.scoring_func: ScoringFunction = scoring_func
        self.n_group = n_group
        self.topk_group = topk_group
        self.experts_per_group_score = 2 if group_score == "top2" else 1
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(n_routed_experts)) if bias else None
        self.register_buffer("e_score_correction_bias", torch.empty(n_routed_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(wide)
        scores_NE = expert_scores(F.linear(x.to(wide), self.weight.to(wide), bias_E), self.scoring_func)
        indices_NA = self.choose(scores_NE.detach() + self.e_score_correction_bias)
        weights_NA = scores_NE.gather(1, indices_NA)
        if self.norm_topk_prob:
            weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
        load_E = torch.bincount(indices_NA.flatten(), minlength=scores_NE.shape[1])
        return Routing(indices_NA, weights_NA * self.routed_scaling_factor, scores_NE, load_E)

    def choose(self, biased_scores: Float[Tensor, "N E"]) -> Int[Tensor, "N A"]:
        """The best experts by biased score within the best groups; of equals, the lowest index."""
        if self.topk_group < self.n_group:
            biased_scores = self.mask_groups(biased_scores)
        return best(biased_scores, self.num_experts_per_tok)

    def mask_groups(self, biased_scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Set the scores outside each token's best groups to minus infinity: a biased score may be below 0."""
        scores_NJI = biased_scores.unflatten(-1, (self.n_group, -1))
        group_scores_NJ = scores_NJI.topk(self.experts_per_group_score, dim=-1).values.sum(-1)
        kept_NA = best(group_scores_NJ, self.topk_group)
        dropped_NJ = torch.ones_like(group_scores_NJ, dtype=torch.bool).scatter(1, kept_NA, False)
        return scores_NJI.masked_fill(dropped_NJ.unsqueeze(-1), -torch.inf).flatten(-2)


def best(scores: Float[Tensor, "N E"], count: int) -> Int[Tensor, "N A"]:
    """Indices of the `count` largest scores, largest first; of equals the lowest index, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
