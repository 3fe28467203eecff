"""Expert choice: experts choose tokens. Balanced by construction, and not causal."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.mixture_of_experts import Experts
from workbench_kernels.moe_route import best


class ExpertChoice(NamedTuple):
    """The K tokens that each expert took, with the weight of each, and the scores of all.

    `visits` counts the experts that took each token: from 0 (nobody, the residual stream alone) to E.
    """

    tokens: Int[Tensor, "E K"]
    weights: Float[Tensor, "E K"]
    scores: Float[Tensor, "N E"]
    visits: Int[Tensor, " N"]


class ExpertChoiceRouter(nn.Module):
    """Every expert takes the K = ceil(capacity_factor * N / E) tokens that score it highest; of equals, the first.

    `capacity_factor` is the mean number of experts per token. Scores are a softmax over the experts.
    A token is taken or not depending on all others, later ones among them: a language model trained with it
    learns from the future, and cannot route the same way while it generates. It is here as a contrast.

    Source: Zhou et al., arXiv 2202.09368, section 3.2.

    Raises:
        ValueError: a capacity factor outside (0, `n_routed_experts`].
    """

    def __init__(self, hidden_size: int, n_routed_experts: int, *, capacity_factor: float) -> None:
        super().__init__()
        if not 0 < capacity_factor <= n_routed_experts:
            raise ValueError(f"capacity_factor={capacity_factor} must lie in (0, {n_routed_experts}] (experts)")
        self.capacity_factor = capacity_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))

    def forward(self, x: Float[Tensor, "N D"]) -> ExpertChoice:
        num_tokens, num_experts = x.shape[0], self.weight.shape[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        scores_NE = F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        tokens_EK = best(scores_NE.detach().T, ceil(self.capacity_factor * num_tokens / num_experts))
        weights_EK = scores_NE.T.gather(1, tokens_EK)
        return ExpertChoice(tokens_EK, weights_EK, scores_NE, torch.bincount(tokens_EK.flatten(), minlength=num_tokens))


class ExpertChoiceMixture(nn.Module):
    """Routed SwiGLU experts that choose their tokens; each adds its weighted output to the tokens it took."""

    def __init__(
        self, hidden_size: int, moe_intermediate_size: int, *, n_routed_experts: int, capacity_factor: float
    ) -> None:
        super().__init__()
        self.gate = ExpertChoiceRouter(hidden_size, n_routed_experts, capacity_factor=capacity_factor)
        self.experts = Experts(hidden_size, moe_intermediate_size, n_routed_experts=n_routed_experts)

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], ExpertChoice]:
        x_ND = x.flatten(0, 1)
        choice = self.gate(x_ND)
        taken_X = choice.tokens.flatten()
        num_experts, taken_each = choice.tokens.shape
        expert_X = torch.arange(num_experts, device=x.device).repeat_interleave(taken_each)
        outputs_XD = self.experts(x_ND[taken_X], expert_X[:, None], choice.weights.flatten()[:, None])
        mixed_ND = outputs_XD.new_zeros(x_ND.shape).index_add(0, taken_X, outputs_XD)
        return mixed_ND.view_as(x), choice
