"""What a feed-forward is: frozen plain data, with the field names of the published configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.field_types import require_types
from workbench.model.require import require, require_positive

ScoringFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
TopKMethod = Literal["greedy", "group_limited_greedy", "noaux_tc", "hash"]


@dataclass(frozen=True, kw_only=True)
class ClampedActivation:
    """gate * sigmoid(alpha * gate) * (up + offset), with gate at most `limit` and up within it on both sides.

    V4 clamps alone; gpt-oss has alpha 1.702 and offset 1 as well.
    """

    limit: float
    alpha: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require(self.limit > 0, f"limit={self.limit} must be above 0")


@dataclass(frozen=True, kw_only=True)
class DenseFeedForward:
    """A SwiGLU every token passes through."""

    intermediate_size: int

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Routed SwiGLU experts, of which every token takes `num_experts_per_tok`, beside `n_shared_experts` that all take.

    `topk_method` is the published name of the choice: `greedy` takes the best experts, `group_limited_greedy` (V2)
    only within the `topk_group` groups with the best single expert, `noaux_tc` (V3) within the groups with the best
    two, all by scores plus a selection bias; `hash` (V4's first layers) reads them from a fixed table by token id.
    `activation=None` is plain SwiGLU. `router_bias` and `expert_bias` are those of gpt-oss.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    scoring_func: ScoringFunction = "sigmoid"
    topk_method: TopKMethod = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    activation: ClampedActivation | None = None
    router_bias: bool = False
    expert_bias: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(
            self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"
        )
        require(self.n_shared_experts >= 0, f"n_shared_experts={self.n_shared_experts} must be 0 or more")
        require(
            self.n_routed_experts % self.n_group == 0,
            f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts}",
        )
        require(
            self.topk_group <= self.n_group, f"topk_group={self.topk_group} must lie in 1..{self.n_group} (n_group)"
        )
        require(
            self.topk_method not in ("greedy", "hash") or self.n_group == 1,
            f"topk_method={self.topk_method!r} knows no groups: n_group={self.n_group} must be 1",
        )
        group_size = self.n_routed_experts // self.n_group
        require(
            self.topk_method != "noaux_tc" or self.n_group == 1 or group_size >= 2,
            f"n_group={self.n_group} leaves groups of {group_size}; noaux_tc scores a group by its best two experts",
        )
        reachable = self.topk_group * group_size
        require(
            self.num_experts_per_tok <= reachable,
            f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..{reachable} (experts in topk_group groups)",
        )
        require(not (self.router_bias and self.topk_method == "hash"), "topk_method='hash' has no router_bias")
        require(self.routed_scaling_factor > 0, f"routed_scaling_factor={self.routed_scaling_factor} must be above 0")


FeedForward = DenseFeedForward | MixtureOfExperts
