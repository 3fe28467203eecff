"""One small model of every published type, and decoders with weights that hide nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.blocks.norm import RMSNorm
from workbench.blocks.router import Router
from workbench.model.config import (
    ClampedActivation,
    CompressedAttention,
    DenseFeedForward,
    GroupedQueryAttention,
    HeavyCompression,
    HyperConnections,
    LatentAttention,
    LayerConfig,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    SparseCompression,
    SparseLatentAttention,
    Yarn,
)
from workbench.model.decoder import Decoder
from workbench.model.hf_folder.names import mtp_depth

VOCABULARY = 61
DENSE = DenseFeedForward(intermediate_size=37)
YARN = Yarn(factor=8.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3)
V4_YARN = Yarn(factor=8.0, original_max_position_embeddings=16, attention_factor=1.0)
LATENT = LatentAttention(
    num_attention_heads=4,
    q_lora_rank=19,
    kv_lora_rank=18,
    qk_nope_head_dim=14,
    qk_rope_head_dim=6,
    v_head_dim=11,
    rope=Rope(rope_interleave=True, rope_theta=500.0, scaling=YARN),
)
BIASED = MixtureOfExperts(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
SOFTMAX = MixtureOfExperts(
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    scoring_func="softmax",
    topk_method="greedy",
)
V2_EXPERTS = replace(BIASED, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
GPT_OSS_EXPERTS = replace(
    SOFTMAX, router_bias=True, expert_bias=True, activation=ClampedActivation(limit=5.0, alpha=1.5, offset=1.0)
)
V4_EXPERTS = replace(
    BIASED,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    scoring_func="sqrtsoftplus",
    activation=ClampedActivation(limit=9.0),
)


def grouped(**changes: Any) -> GroupedQueryAttention:
    return replace(GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=10), **changes)


def model(*layers: LayerConfig, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "max_position_embeddings": 128, "initializer_range": 0.2}
    return ModelConfig(layers=layers, **sizes | changes)


def alike(attention: Any, *feed_forwards: Any, **changes: Any) -> ModelConfig:
    return model(*(LayerConfig(attention, x) for x in feed_forwards), **changes)


def sliding(full: GroupedQueryAttention, feed_forward: Any, *windows: int | None) -> ModelConfig:
    return model(*(LayerConfig(replace(full, sliding_window=window), feed_forward) for window in windows))


def v4() -> ModelConfig:
    window = CompressedAttention(
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=4,
        q_lora_rank=12,
        o_groups=2,
        o_lora_rank=6,
        sliding_window=8,
    )
    stretched = Rope(rope_interleave=True, rope_theta=160000.0, scaling=V4_YARN)
    # So many index heads that no two scores are both exactly zero: the reference leaves the order of ties open.
    sparse = SparseCompression(compress_ratio=3, index_n_heads=13, index_head_dim=8, index_topk=2)
    hashed = replace(V4_EXPERTS, topk_method="hash")
    return model(
        LayerConfig(window, hashed),
        LayerConfig(replace(window, compression=sparse, rope=stretched), V4_EXPERTS),
        LayerConfig(replace(window, compression=HeavyCompression(compress_ratio=5), rope=stretched), V4_EXPERTS),
        hyper_connections=HyperConnections(hc_mult=3, hc_sinkhorn_iters=7, hc_eps=1e-5),
    )


# Those that the decoder builds.
BUILT = {
    "llama": alike(grouped(rope=Rope(rope_theta=500.0)), DENSE, DENSE, rms_norm_eps=1e-5),
    "llama, tied": alike(grouped(), DENSE, DENSE, tie_word_embeddings=True),
    "mixtral": alike(grouped(), SOFTMAX, SOFTMAX),
    "deepseek_v2": alike(LATENT, DENSE, V2_EXPERTS, V2_EXPERTS),
    "deepseek_v2, uncompressed": alike(replace(LATENT, q_lora_rank=None), DENSE, V2_EXPERTS),
    "deepseek_v3": alike(LATENT, DENSE, BIASED, BIASED),
    "deepseek_v3, half layout, no shared": alike(
        replace(LATENT, rope=Rope(rope_theta=500.0)), replace(BIASED, n_shared_experts=0, norm_topk_prob=False)
    ),
    # So many index heads that no two scores are both exactly zero: the reference leaves the order of ties open.
    "deepseek_v32": alike(
        SparseLatentAttention(latent=LATENT, index_n_heads=13, index_head_dim=8, index_topk=3), DENSE, BIASED
    ),
    "llama 3.1": alike(
        grouped(
            qkv_bias=True,
            o_bias=True,
            rope=Rope(
                scaling=Llama3Scaling(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
                )
            ),
        ),
        DENSE,
        DENSE,
    ),
    "qwen2": alike(grouped(qkv_bias=True), DENSE, DENSE),
    "qwen3_moe": alike(grouped(qk_norm="head"), SOFTMAX, DENSE, SOFTMAX),
    "olmoe": alike(grouped(head_dim=12, qk_norm="full"), replace(SOFTMAX, norm_topk_prob=False)),
    "glm4_moe": alike(grouped(qkv_bias=True, qk_norm="head", partial_rotary_factor=0.6), DENSE, BIASED),
    "dots1": alike(grouped(qk_norm="head"), DENSE, BIASED),
}
BUILT |= {
    "mixtral, windowed": alike(grouped(sliding_window=9), SOFTMAX, SOFTMAX),
    "qwen2, windowed above": sliding(grouped(qkv_bias=True), DENSE, None, 6),
    "dots1, windowed below": sliding(grouped(qk_norm="head"), BIASED, 8, None),
    "gpt_oss": sliding(grouped(qkv_bias=True, o_bias=True, sinks=True), GPT_OSS_EXPERTS, 7, None, 7),
    "deepseek_v4": v4(),
}
# Every published type.
TYPES = {
    "llama": BUILT["llama 3.1"],
    "mixtral": BUILT["mixtral, windowed"],
    "gpt_oss": BUILT["gpt_oss"],
    **{name: BUILT[name] for name in ("qwen2", "qwen3_moe", "olmoe", "glm4_moe", "dots1")},
    **{name: BUILT[name] for name in ("deepseek_v2", "deepseek_v3", "deepseek_v32")},
    "deepseek_v4": BUILT["deepseek_v4"],
}


def with_experts(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same configuration with other routing in every layer that routes."""
    layers = (
        replace(layer, feed_forward=replace(layer.feed_forward, **changes))
        if isinstance(layer.feed_forward, MixtureOfExperts)
        else layer
        for layer in config.layers
    )
    return replace(config, layers=tuple(layers))


def with_attention(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same configuration with another attention in every layer."""
    layers = (replace(layer, attention=replace(layer.attention, **changes)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def make(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder in which no two weights are alike and selection biases change choices, where there are any."""
    torch.manual_seed(7)
    decoder = Decoder(config)
    chooses = {id(decoder)}
    for stack, layers in ((decoder.layers, config.layers), (decoder.mtp_layers, config.mtp_layers)):
        for block, layer in zip(stack, layers, strict=True):
            if isinstance(layer.feed_forward, MixtureOfExperts) and layer.feed_forward.topk_method == "noaux_tc":
                chooses |= {id(module) for module in block.modules()}
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        for name in ("bias", "sinks", "position_bias", "base", "hc_base", "gate_up_proj_bias", "down_proj_bias"):
            if isinstance(bias := getattr(module, name, None), Tensor):
                torch.nn.init.normal_(bias, std=0.3)
        if isinstance(module, Router) and id(module) in chooses:
            module.e_score_correction_bias.normal_(std=0.5)
    return decoder.to(dtype)


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))


def reference(folder: Path) -> Any:
    """What `transformers` reads from a folder, everything in it found and used."""
    read: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    peer, said = read
    # Without shared experts the reference has some of width 0.
    missing = [key for key in said["missing_keys"] if peer.get_parameter(key).numel()]
    further = [key for key in said["unexpected_keys"] if mtp_depth(key, len(peer.model.layers)) is None]
    assert not missing and not further and not said["mismatched_keys"], said
    return peer.eval()


@torch.no_grad()
def difference(ours: Any, theirs: Any, text: Tensor | None = None) -> float:
    """The largest difference of logits, relative to the largest logit."""
    text = tokens() if text is None else text
    one, other = ours(text).logits, theirs(text).logits
    assert other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))
