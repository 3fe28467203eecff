"""Mixture of experts: many small feed-forwards, of which each token pays for a few."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.feed_forward import SwiGLU
from workbench.blocks.hash_router import HashRouter
from workbench.blocks.router import Router, Routing
from workbench_kernels.gated import SWIGLU, GatedActivation
from workbench_kernels.moe_mlp import moe_mlp


class MixtureOutput(NamedTuple):
    """What a mixture adds to the residual stream, and how it routed."""

    hidden: Float[Tensor, "B T D"]
    routing: Routing


class Experts(nn.Module):
    """The routed experts, their weights stacked: [E, 2F, D] for gate and up, [E, D, F] for down; biases likewise."""

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        *,
        n_routed_experts: int,
        bias: bool = False,
        activation: GatedActivation = SWIGLU,
    ) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(n_routed_experts, width)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(n_routed_experts, hidden_size)) if bias else None

    def forward(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N A"], weights: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N D"]:
        return moe_mlp(
            x,
            self.gate_up_proj,
            self.down_proj,
            indices,
            weights,
            b13=self.gate_up_proj_bias,
            b2=self.down_proj_bias,
            activation=self.activation,
        )


class MixtureOfExperts(nn.Module):
    """Routed experts, weighted, plus shared experts that every token takes. Dropless: every choice is computed.

    `shared_intermediate_size` is the width of all shared experts together (0: none); they share the `activation` and
    never have biases.

    Source: DeepSeekMoE, arXiv 2401.06066, section 3.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        *,
        n_routed_experts: int,
        shared_intermediate_size: int,
        router: Router | HashRouter,
        expert_bias: bool = False,
        activation: GatedActivation = SWIGLU,
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = Experts(
            hidden_size,
            moe_intermediate_size,
            n_routed_experts=n_routed_experts,
            bias=expert_bias,
            activation=activation,
        )
        self.shared_experts = None
        if shared_intermediate_size:
            self.shared_experts = SwiGLU(hidden_size, shared_intermediate_size, activation=activation)

    def forward(self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"] | None = None) -> MixtureOutput:
        """`tokens` are the ids, which only a hash router reads."""
        x_ND = x.flatten(0, 1)
        if isinstance(self.gate, HashRouter):
            assert tokens is not None, "a hash router reads the ids of the tokens"
            routing = self.gate(x_ND, tokens.flatten())
        else:
            routing = self.gate(x_ND)
        mixed_BTD = self.experts(x_ND, routing.indices, routing.weights).view_as(x)
        if self.shared_experts is not None:
            mixed_BTD = mixed_BTD + self.shared_experts(x)
        return MixtureOutput(mixed_BTD, routing)
