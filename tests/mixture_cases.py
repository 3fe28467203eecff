"""Inputs that every tier of moe_mlp is tested with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench_kernels import GatedActivation

CLAMPED = GatedActivation(limit=0.8, alpha=1.7, offset=1.0)


def make(
    tokens: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    experts: int = 8,
    active: int = 2,
    used: int | None = None,
    weights_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens choose among the first `used` experts."""
    torch.manual_seed(0)
    return (
        torch.randn(tokens, width).to(device, dtype),
        (torch.randn(experts, 2 * hidden, width) / math.sqrt(width)).to(device, dtype),
        (torch.randn(experts, width, hidden) / math.sqrt(hidden)).to(device, dtype),
        torch.rand(tokens, used or experts).argsort(dim=1)[:, :active].contiguous().to(device),
        torch.rand(tokens, active).to(device, weights_dtype or dtype),
    )


def make_biased(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The same, and biases of both products."""
    inputs = make(*args, **kwargs)
    return (*inputs, *(torch.randn(matrix.shape[:2]).to(matrix) for matrix in inputs[1:3]))


def with_biases(op: Callable[..., Tensor], activation: GatedActivation = CLAMPED) -> Callable[..., Tensor]:
    """The op with biases as two more tensors, and a clamp that many products of `make` reach."""
    return lambda *tensors: op(*tensors[:5], b13=tensors[5], b2=tensors[6], activation=activation)
