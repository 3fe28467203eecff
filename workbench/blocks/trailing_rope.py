"""Rotary position embedding of the last numbers of a head, and its undoing.

A head that is key and value at once brings its own position into the output. Turning the output back by the query's
position leaves the distance alone: what a head says about a token depends on how far away it is, not on where it is.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.blocks.rope import Rotation, rotate_interleaved


def rotate_trailing(x: Float[Tensor, "B T heads K"], turn: Rotation) -> Float[Tensor, "B T heads K"]:
    """Turn neighbouring pairs of the last numbers of every head, as many as `turn` has angles for; keep the others.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.
    """
    rotary_width = 2 * turn.cos.shape[-1]
    nope, rope = x.split((x.shape[-1] - rotary_width, rotary_width), dim=-1)
    return torch.cat((nope, rotate_interleaved(rope, turn)), dim=-1)


def backward(turn: Rotation) -> Rotation:
    """The same angles in the other direction."""
    return Rotation(turn.cos, -turn.sin)
