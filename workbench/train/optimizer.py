"""AdamW in two groups: matrices decay, gains and biases do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from workbench.field_types import require_types
from workbench.model.config import require


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled weight decay, with the gradient clipped to `max_grad_norm` first.

    Source: Loshchilov and Hutter, arXiv 1711.05101; values of DeepSeek-V3, arXiv 2412.19437, section 4.2.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        require(
            0 < self.learning_rate < float("inf"),
            f"learning_rate={self.learning_rate} must be a positive finite number",
        )
        require(0 <= self.beta1 < 1, f"beta1={self.beta1} must lie in [0, 1)")
        require(0 <= self.beta2 < 1, f"beta2={self.beta2} must lie in [0, 1)")
        require(self.eps > 0, f"eps={self.eps} must be above 0")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must be 0 or more")
        require(self.max_grad_norm > 0, f"max_grad_norm={self.max_grad_norm} must be above 0")


def build_optimizer(settings: AdamW, named_parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer with its two groups; tensors of one axis (norm gains) do not decay."""
    matrices = [p for p in named_parameters.values() if p.ndim >= 2]
    vectors = [p for p in named_parameters.values() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
