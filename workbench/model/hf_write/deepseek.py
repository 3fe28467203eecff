"""Published types with latent attention: what each holds fixed, and the fields for what it leaves free."""

from __future__ import annotations

from workbench.model.attention_config import LatentAttention, SparseLatentAttention
from workbench.model.config import ModelConfig
from workbench.model.hf_write.parts import (
    Fields,
    experts_of_the_line,
    fixed,
    latent,
    no_extras,
    same_attention,
    same_experts,
    whole_heads,
)
from workbench.model.require import require


def deepseek_v2(config: ModelConfig) -> Fields:
    no_extras(config, "deepseek_v2")
    attention = same_attention(config, LatentAttention, "deepseek_v2")
    fixed(attention.rope, "deepseek_v2", rope_interleave=True)
    whole_heads(config, attention, "deepseek_v2")
    experts = same_experts(config, "deepseek_v2")
    methods = ("greedy", "group_limited_greedy")
    require(
        experts.topk_method in methods, f"deepseek_v2 has topk_method {' or '.join(methods)}, not {experts.topk_method}"
    )
    return {
        **latent(attention),
        **experts_of_the_line(config, "deepseek_v2", scoring_func="softmax", norm_topk_prob=False),
    }


def deepseek_v3(config: ModelConfig) -> Fields:
    no_extras(config, "deepseek_v3", mtp=True)
    attention = same_attention(config, LatentAttention, "deepseek_v3")
    return {
        **latent(attention),
        "rope_interleave": attention.rope.rope_interleave,
        **experts_of_the_line(config, "deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc"),
        "num_nextn_predict_layers": len(config.mtp_layers),
    }


def deepseek_v32(config: ModelConfig) -> Fields:
    no_extras(config, "deepseek_v32", mtp=True)
    attention = same_attention(config, SparseLatentAttention, "deepseek_v32")
    fixed(attention.rope, "deepseek_v32", rope_interleave=True)
    return {
        **latent(attention.latent),
        "index_n_heads": attention.index_n_heads,
        "index_head_dim": attention.index_head_dim,
        "index_topk": attention.index_topk,
        **experts_of_the_line(config, "deepseek_v32", scoring_func="sigmoid", topk_method="noaux_tc"),
        "num_nextn_predict_layers": len(config.mtp_layers),
    }
