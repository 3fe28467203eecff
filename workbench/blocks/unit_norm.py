"""Root-mean-square normalisation without a gain."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unit_rms(x: Float[Tensor, "*batch D"], eps: float) -> Float[Tensor, "*batch D"]:
    """Divide by the root mean square over the last axis; `eps` is added to the mean square.

    The statistics are float32 or wider, whatever the input's dtype.

    Source: Zhang and Sennrich, arXiv 1910.07467, with every gain 1.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
