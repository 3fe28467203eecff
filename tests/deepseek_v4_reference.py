"""Small parts of DeepSeek-V4 in `transformers`, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config
from wide_reference import modeling


def reference(dtype: torch.dtype) -> Any:
    """The module that defines the reference."""
    return modeling("deepseek_v4", dtype)


def tiny_config(layer_type: str, **changes: Any) -> DeepseekV4Config:
    """One layer of odd sizes: width 20, 6 heads of 10 of which 4 turn, ratios 3 (sparse) and 5 (heavy), window 7."""
    settings: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 20,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "head_dim": 10,
        "partial_rotary_factor": 0.4,
        "q_lora_rank": 9,
        "num_experts_per_tok": 3,
        "n_routed_experts": 7,
        "layer_types": [layer_type],
        "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
        "sliding_window": 7,
        "o_groups": 3,
        "o_lora_rank": 5,
        "index_n_heads": 12,
        "index_head_dim": 7,
        "index_topk": 2,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 7,
        "rope_theta": 100.0,
        "compress_rope_theta": 900.0,
        "max_position_embeddings": 128,
        "attn_implementation": "eager",
    }
    return DeepseekV4Config(**(settings | changes))


def with_random_weights(module: nn.Module, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: gains, biases and sinks too, whose usual values would hide that they are missing."""
    draw = torch.Generator().manual_seed(seed)
    module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
    return module


def with_weights_of(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`ours` holding the weights of the reference, by name; neither may have one that the other lacks."""
    ours.to(dtype).load_state_dict(theirs.state_dict(), strict=True)
    return ours


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest number of `theirs` where that is above 1."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
