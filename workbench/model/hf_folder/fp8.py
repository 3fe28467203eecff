"""Weights in FP8 (E4M3) with one scale per block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def dequantize(
    weight: Float[Tensor, "out in_"], scale: Float[Tensor, "out_blocks in_blocks"], *, block: tuple[int, int]
) -> Float[Tensor, "out in_"]:
    """weight[i, j] * scale[i // block[0], j // block[1]] in float32; the last blocks of a row or column may be cut.

    The published name of the scale, `weight_scale_inv`, misleads: it multiplies.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    wide = scale.to(torch.float32)
    for axis in (0, 1):
        wide = wide.repeat_interleave(block[axis], dim=axis).narrow(axis, 0, weight.shape[axis])
    return weight.to(torch.float32) * wide


def scale_shape(weight_shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight; axes before the last two are kept."""
    *kept, rows, columns = weight_shape
    return (*kept, -(-rows // block[0]), -(-columns // block[1]))
