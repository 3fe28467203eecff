"""Mixture of experts: many small feed-forwards, of which each token pays for a few."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.feed_forward import SwiGLU
from workbench.blocks.router import Router, Routing
from workbench_kernels.moe_mlp import moe_mlp


class MixtureOutput(NamedTuple):
    """What a mixture adds to the residual stream, and how it routed."""

    hidden: Float[Tensor, "B T D"]
    routing: Routing


class Experts(nn.Module):
    """The routed SwiGLU experts, their weights stacked: [E, 2F, D] for gate and up, [E, D, F] for down."""

    def __init__(self, hidden_size: int, moe_intermediate_size: int, *, n_routed_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))

    def forward(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N A"], weights: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N D"]:
        return moe_mlp(x, self.gate_up_proj, self.down_proj, indices, weights)


class MixtureOfExperts(nn.Module):
    """Routed experts, weighted, plus shared experts that every token takes. Dropless: every choice is computed.

    `shared_intermediate_size` is the width of all shared experts together (0: none).

    Source: DeepSeekMoE, arXiv 2401.06066, section 3.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        *,
        n_routed_experts: int,
        shared_intermediate_size: int,
        router: Router,
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = Experts(hidden_size, moe_intermediate_size, n_routed_experts=n_routed_experts)
        self.shared_experts = SwiGLU(hidden_size, shared_intermediate_size) if shared_intermediate_size else None

    def forward(self, x: Float[Tensor, "B T D"]) -> MixtureOutput:
        x_ND = x.flatten(0, 1)
        routing = self.gate(x_ND)
        mixed_BTD = self.experts(x_ND, routing.indices, routing.weights).view_as(x)
        if self.shared_experts is not None:
            mixed_BTD = mixed_BTD + self.shared_experts(x)
        return MixtureOutput(mixed_BTD, routing)
