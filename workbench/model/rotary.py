"""How the heads of an attention turn with the position, from its specification."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.blocks.rope import frequencies, llama3_frequencies, yarn_frequencies, yarn_mscale
from workbench.model import config as spec


def rotary_frequencies(attention: spec.Attention, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " pairs"]:
    """Angle per position of every rotary pair of an attention."""
    rope, width = attention.rope, rotary_width(attention)
    place = {"dtype": dtype, "device": device}
    match rope.scaling:
        case spec.Yarn() as yarn:
            return yarn_frequencies(
                width,
                rope.rope_theta,
                factor=yarn.factor,
                original_max_position_embeddings=yarn.original_max_position_embeddings,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
                truncate=yarn.truncate,
                **place,
            )
        case spec.Llama3Scaling() as llama3:
            return llama3_frequencies(
                width,
                rope.rope_theta,
                factor=llama3.factor,
                low_freq_factor=llama3.low_freq_factor,
                high_freq_factor=llama3.high_freq_factor,
                original_max_position_embeddings=llama3.original_max_position_embeddings,
                **place,
            )
        case None:
            return frequencies(width, rope.rope_theta, **place)


def rotary_width(attention: spec.Attention) -> int:
    """How many numbers of a head turn with the position."""
    match attention:
        case spec.GroupedQueryAttention():
            return attention.rotary_width
        case spec.SparseLatentAttention(latent=latent):
            return latent.qk_rope_head_dim
        case _:
            return attention.qk_rope_head_dim


def rotation_scale(scaling: spec.Yarn | spec.Llama3Scaling | None) -> float:
    """What YaRN multiplies cosines and sines by."""
    if not isinstance(scaling, spec.Yarn):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def softmax_sharpening(scaling: spec.Yarn | spec.Llama3Scaling | None) -> float:
    """What YaRN multiplies MLA's softmax scale by: the square of the factor from `mscale_all_dim`."""
    if not isinstance(scaling, spec.Yarn) or not scaling.mscale_all_dim:
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
