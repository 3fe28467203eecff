"""Inputs and options that every tier of moe_route is tested with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench_kernels import moe_route
from workbench_kernels.moe_route import MoeRouting

OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"scoring_func": "softmax", "norm_topk_prob": True},
    "v2": {"scoring_func": "softmax", "n_group": 4, "topk_group": 2, "group_score": "max"},
    "v3": {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    "v4": {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "groups of one": {"scoring_func": "sigmoid", "n_group": 12, "topk_group": 7},
    "odd groups": {"scoring_func": "sqrtsoftplus", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 0.5},
}


def make_logits(tokens: int, experts: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits and a selection bias that changes choices."""
    torch.manual_seed(0)
    bias = 0.3 * torch.randn(experts).to(device)
    return (2 * torch.randn(tokens, experts)).to(device, dtype), bias


def differentiable(logits: Tensor, active: int, **options: Any) -> Tensor:
    """What gradients flow through: weights and scores in one tensor."""
    routing = moe_route(logits, active, **options)
    return torch.cat((routing.weights.flatten(), routing.scores.flatten()))


def assert_same_choice(found: MoeRouting, expected: MoeRouting) -> None:
    for name in ("indices", "counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if expected.order is not None:
        assert found.order is not None
        for name, ours, theirs in zip(expected.order._fields, found.order, expected.order, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
