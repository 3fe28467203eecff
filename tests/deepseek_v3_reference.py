"""The reference implementation of `transformers`, built from our configuration and holding our weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from workbench.model.config import DenseFeedForward, LatentAttention, MixtureOfExperts, ModelConfig, Yarn
from workbench.model.decoder import Decoder


def reference_config(config: ModelConfig) -> DeepseekV3Config:
    """The published form of a V3-style configuration (every layer alike but for leading dense ones, no MTP)."""
    first_sparse = next(i for i, layer in enumerate(config.layers) if isinstance(layer.feed_forward, MixtureOfExperts))
    attention, experts = config.layers[0].attention, config.layers[first_sparse].feed_forward
    assert isinstance(attention, LatentAttention) and isinstance(experts, MixtureOfExperts)
    dense = config.layers[0].feed_forward
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": attention.rope.rope_theta}
    if isinstance(yarn := attention.rope.scaling, Yarn):
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        rope |= {k: v for k in ("mscale", "mscale_all_dim") if (v := getattr(yarn, k)) is not None}
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=dense.intermediate_size if isinstance(dense, DenseFeedForward) else 1,
        moe_intermediate_size=experts.moe_intermediate_size,
        num_hidden_layers=len(config.layers),
        first_k_dense_replace=first_sparse,
        num_attention_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_attention_heads,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        n_routed_experts=experts.n_routed_experts,
        n_shared_experts=experts.n_shared_experts,
        num_experts_per_tok=experts.num_experts_per_tok,
        n_group=experts.n_group,
        topk_group=experts.topk_group,
        norm_topk_prob=experts.norm_topk_prob,
        routed_scaling_factor=experts.routed_scaling_factor,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        rope_interleave=attention.rope.rope_interleave,
        num_mtp_layers=0,
    )


def reference_with_weights_of(decoder: Decoder) -> Any:
    """The reference model holding exactly the weights and selection biases of `decoder`."""
    peer = DeepseekV3ForCausalLM(reference_config(decoder.config))
    ours = decoder.state_dict()
    renamed = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in ours.items()}
    peer.load_state_dict(renamed)
    peer.set_experts_implementation("eager")
    return peer


def lift_float32_casts(peer: nn.Module, frequencies: Tensor) -> None:
    """Let the reference compute in float64 throughout: its norms, rotary angles and router cast to float32 by name.

    Called on a peer already cast to float64. Each new forward is the formula that the old one names, without the cast.
    `frequencies` are those of the rotary pairs in float64; that they are the reference's own is a test of float32.
    """
    for module in peer.modules():
        kind = type(module).__name__
        if kind == "DeepseekV3RMSNorm":
            module.forward = _float64_norm(module)
        elif kind == "DeepseekV3TopkRouter":
            module.forward = _float64_router(module)
        elif kind == "DeepseekV3RotaryEmbedding":
            module.forward = _float64_rotary(module, frequencies)


def _float64_norm(norm):
    def forward(x):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    return forward


def _float64_router(router):
    def forward(x):
        x = x.view(-1, router.hidden_dim)
        logits = x @ router.weight.T
        scores = logits.sigmoid()
        biased = (scores + router.e_score_correction_bias).view(len(x), router.num_group, -1)
        groups = biased.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
        mask = torch.zeros(biased.shape[:2], dtype=torch.bool).scatter(1, groups, True)
        chosen = biased.masked_fill(~mask[..., None], float("-inf")).flatten(1).topk(router.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if router.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * router.routed_scaling_factor, chosen

    return forward


def _float64_rotary(rotary, frequencies):
    def forward(x, position_ids):
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    return forward
