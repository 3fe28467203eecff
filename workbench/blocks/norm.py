"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench_kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then multiply by a learned gain.

    The statistics are float32 or wider, whatever the input's dtype.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """

    def __init__(self, hidden_size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return rms_norm(x, self.weight, self.eps)
