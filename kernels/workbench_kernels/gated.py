"""The gated activation between the two products of a feed-forward: SwiGLU and its clamped relatives."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GatedActivation(NamedTuple):
    """`g * sigmoid(alpha * g) * (u + offset)`, with g the gate, at most `limit`, and u the other product, within it.

    The defaults are SwiGLU. DeepSeek-V4 has a limit alone; gpt-oss has alpha 1.702 and offset 1 as well.

    Source: Shazeer, arXiv 2002.05202, equation 6; the models' published code for the clamps.
    """

    limit: float = math.inf
    alpha: float = 1.0
    offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation, of the shape that both have."""
        return self.of_gate(gate) * self.of_up(up)

    def of_gate(self, gate: Tensor) -> Tensor:
        """The factor that the gate makes, in a tensor of its own."""
        if self.is_swiglu:
            return F.silu(gate)
        clamped = gate.clamp(max=self.limit)
        return clamped * torch.sigmoid(self.alpha * clamped)

    def of_up(self, up: Tensor) -> Tensor:
        """The other factor; `up` itself for SwiGLU."""
        return up if self.is_swiglu else up.clamp(-self.limit, self.limit) + self.offset

    def grad_of_gate(self, grad: Tensor, gate: Tensor, *, out: Tensor) -> None:
        """Turn the gradient of `of_gate` into that of the gate; at the limit itself it passes, as in torch's clamp."""
        if self.is_swiglu:
            torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
            return
        clamped = gate.clamp(max=self.limit)
        sigmoid = torch.sigmoid(self.alpha * clamped)
        torch.mul(grad, sigmoid * (1 + self.alpha * clamped * (1 - sigmoid)), out=out).mul_(gate <= self.limit)

    def grad_of_up_(self, grad: Tensor, up: Tensor) -> None:
        """Turn the gradient of `of_up` into that of the other product, in place."""
        if not self.is_swiglu:
            grad.mul_(up.abs() <= self.limit)

    @property
    def is_swiglu(self) -> bool:
        """Whether nothing is clamped, sharpened or shifted."""
        return self == (math.inf, 1.0, 0.0)


SWIGLU = GatedActivation()
