"""The gated feed-forward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from workbench_kernels.gated import SWIGLU, GatedActivation


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases; with another `activation` a clamped relative.

    Source: Shazeer, arXiv 2002.05202, equation 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: GatedActivation = SWIGLU) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))
