"""The router: which experts a token visits, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.keep_wide import KeepWide
from workbench_kernels.moe_route import GroupScore, ScoringFunction, moe_route


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
        group_score: GroupScore,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.scoring_func: ScoringFunction = scoring_func
        self.n_group = n_group
        self.topk_group = topk_group
        self.group_score: GroupScore = group_score
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(n_routed_experts)) if bias else None
        self.register_buffer("e_score_correction_bias", torch.empty(n_routed_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(wide)
        routing = moe_route(
            F.linear(x.to(wide), self.weight.to(wide), bias_E),
            self.num_experts_per_tok,
            scoring_func=self.scoring_func,
            bias=self.e_score_correction_bias,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )
        return Routing(routing.indices, routing.weights, routing.scores, routing.counts)
