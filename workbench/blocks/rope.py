"""Rotary position embedding: pairs of numbers turned by an angle that grows with the position.

The dot product of a turned query and a turned key depends on their distance alone. Two layouts of the pairs are in
use: neighbours (DeepSeek) and the two halves of the vector (Llama); weights trained for one are wrong in the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench_kernels.rope import rope


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle at every position; R/2 pairs."""

    cos: Float[Tensor, "T pairs"]
    sin: Float[Tensor, "T pairs"]


def frequencies(
    rotary_width: int, theta: float, *, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " pairs"]:
    """Angle per position of each pair: theta^(-2i / rotary_width).

    Source: Su et al., arXiv 2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, rotary_width, 2, dtype=dtype, device=device) / rotary_width
    return 1.0 / theta**exponents


def yarn_frequencies(
    rotary_width: int,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool = True,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, " pairs"]:
    """Frequencies stretched by `factor`: slow pairs interpolated, fast pairs kept, a linear ramp between.

    A pair that makes at least `beta_fast` turns within the original window is kept as it is, one that makes at most
    `beta_slow` is slowed down by `factor`. `truncate` rounds the ramp's ends to whole pairs.

    Source: YaRN, arXiv 2309.00071, section 3.2, with the rounding of the ramp's ends that DeepSeek's code has.
    """

    def pair_with_turns(turns: float) -> float:
        turns_per_pair = original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_width * math.log(turns_per_pair) / (2 * math.log(theta))

    low, high = pair_with_turns(beta_fast), pair_with_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_width - 1)
    width = high - low if high != low else 1e-3
    pairs = torch.arange(rotary_width // 2, dtype=dtype, device=device)
    kept = 1 - ((pairs - low) / width).clamp(0, 1)
    powers = theta ** (torch.arange(0, rotary_width, 2, dtype=dtype, device=device) / rotary_width)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept


def llama3_frequencies(
    rotary_width: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, " pairs"]:
    """Frequencies of Llama 3.1: slow pairs divided by `factor`, fast pairs kept, a linear ramp between.

    A pair that makes at least `high_freq_factor` turns within the original window is kept as it is, one that makes at
    most `low_freq_factor` is slowed down by `factor`.

    Source: the rope type `llama3` of published configurations; Llama 3, arXiv 2407.21783, section 3.4.2.
    """
    plain = frequencies(rotary_width, theta, dtype=dtype, device=device)
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much attention logits are sharpened when the window is stretched `factor`-fold: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation(positions: Int[Tensor, " T"], frequencies: Float[Tensor, " pairs"], *, scale: float = 1.0) -> Rotation:
    """The turn of every pair at each of `positions`; `scale` multiplies both cosine and sine (YaRN)."""
    angles = positions[:, None].to(frequencies.dtype) * frequencies[None, :]
    return Rotation(angles.cos() * scale, angles.sin() * scale)


def rotate_interleaved(x: Float[Tensor, "B T heads R"], turn: Rotation) -> Float[Tensor, "B T heads R"]:
    """Turn the pairs (0, 1), (2, 3), ... of the last axis."""
    return rope(x, *turn, interleaved=True)


def rotate_halves(x: Float[Tensor, "B T heads R"], turn: Rotation) -> Float[Tensor, "B T heads R"]:
    """Turn the pairs (0, R/2), (1, R/2 + 1), ... of the last axis."""
    return rope(x, *turn, interleaved=False)
