"""Published types with grouped-query attention: what each holds fixed, and the fields for what it leaves free."""

from __future__ import annotations

from workbench.model.attention_config import GroupedQueryAttention
from workbench.model.config import ModelConfig
from workbench.model.feed_forward_config import DenseFeedForward
from workbench.model.hf_write.parts import (
    Fields,
    dense_width,
    experts_of_the_line,
    fixed,
    grouped,
    no_dense,
    no_extras,
    same_attention,
    same_experts,
    softmax_experts,
    whole_heads,
    windows_by_layer,
)
from workbench.model.require import require


def llama(config: ModelConfig) -> Fields:
    no_extras(config, "llama")
    attention = same_attention(config, GroupedQueryAttention, "llama")
    fixed(attention, "llama", qk_norm=None, partial_rotary_factor=1.0, sliding_window=None, sinks=False)
    fixed(attention, "llama", o_bias=attention.qkv_bias)
    whole_heads(config, attention, "llama")
    return {**grouped(attention), "attention_bias": attention.qkv_bias, "mlp_bias": False} | dense_width(
        config.layers, "llama"
    )


def qwen2(config: ModelConfig) -> Fields:
    no_extras(config, "qwen2")
    attention, windows = windows_by_layer(config, "qwen2")
    fixed(attention, "qwen2", qkv_bias=True, o_bias=False, qk_norm=None, partial_rotary_factor=1.0, sinks=False)
    return {
        **grouped(attention),
        "use_sliding_window": windows["sliding_window"] is not None,
        **windows,
        **dense_width(config.layers, "qwen2"),
    }


def mixtral(config: ModelConfig) -> Fields:
    no_extras(config, "mixtral")
    attention = same_attention(config, GroupedQueryAttention, "mixtral")
    fixed(attention, "mixtral", qkv_bias=False, o_bias=False, qk_norm=None, partial_rotary_factor=1.0, sinks=False)
    no_dense(config, "mixtral")
    experts = softmax_experts(config, "mixtral", norm_topk_prob=True)
    return {
        **grouped(attention),
        "sliding_window": attention.sliding_window,
        "intermediate_size": experts.moe_intermediate_size,
        "num_local_experts": experts.n_routed_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
    }


def qwen3_moe(config: ModelConfig) -> Fields:
    no_extras(config, "qwen3_moe")
    attention = same_attention(config, GroupedQueryAttention, "qwen3_moe")
    fixed(attention, "qwen3_moe", qk_norm="head", partial_rotary_factor=1.0, sinks=False, o_bias=attention.qkv_bias)
    experts = softmax_experts(config, "qwen3_moe")
    dense = [i for i, layer in enumerate(config.layers) if isinstance(layer.feed_forward, DenseFeedForward)]
    return {
        **grouped(attention),
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
        **dense_width(config.layers, "qwen3_moe"),
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": experts.moe_intermediate_size,
        "num_experts": experts.n_routed_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "norm_topk_prob": experts.norm_topk_prob,
    }


def olmoe(config: ModelConfig) -> Fields:
    no_extras(config, "olmoe")
    attention = same_attention(config, GroupedQueryAttention, "olmoe")
    fixed(attention, "olmoe", qk_norm="full", partial_rotary_factor=1.0, sliding_window=None, sinks=False)
    fixed(attention, "olmoe", o_bias=attention.qkv_bias, head_dim=config.hidden_size // attention.num_attention_heads)
    no_dense(config, "olmoe")
    experts = softmax_experts(config, "olmoe")
    return {
        **grouped(attention),
        "attention_bias": attention.qkv_bias,
        "clip_qkv": None,
        "intermediate_size": experts.moe_intermediate_size,
        "num_experts": experts.n_routed_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "norm_topk_prob": experts.norm_topk_prob,
    }


def gpt_oss(config: ModelConfig) -> Fields:
    no_extras(config, "gpt_oss")
    attention, windows = windows_by_layer(config, "gpt_oss")
    fixed(attention, "gpt_oss", sinks=True, qk_norm=None, partial_rotary_factor=1.0, o_bias=attention.qkv_bias)
    no_dense(config, "gpt_oss")
    experts = same_experts(config, "gpt_oss")
    fixed(experts, "gpt_oss", scoring_func="softmax", topk_method="greedy", norm_topk_prob=True, n_shared_experts=0)
    fixed(experts, "gpt_oss", router_bias=True, expert_bias=True, routed_scaling_factor=1.0)
    activation = experts.activation
    if activation is None or activation.offset != 1.0:
        raise ValueError(f"gpt_oss has a clamped activation with offset=1.0; this configuration has {activation}")
    # Here a stretching that is absent or null means the published model's.
    plain = {} if attention.rope.scaling else {"rope_scaling": {"rope_type": "default"}}
    return {
        **grouped(attention),
        **plain,
        "attention_bias": attention.qkv_bias,
        **windows,
        # `transformers` asks for a width even where no layer slides.
        "sliding_window": windows["sliding_window"] or config.max_position_embeddings,
        "intermediate_size": experts.moe_intermediate_size,
        "num_local_experts": experts.n_routed_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "swiglu_limit": activation.limit,
        "swiglu_alpha": activation.alpha,
    }


def glm4_moe(config: ModelConfig) -> Fields:
    no_extras(config, "glm4_moe", mtp=True)
    attention = same_attention(config, GroupedQueryAttention, "glm4_moe")
    fixed(attention, "glm4_moe", o_bias=False, sliding_window=None, sinks=False)
    require(attention.qk_norm != "full", "glm4_moe has qk_norm=None or 'head'; this configuration has 'full'")
    return {
        **grouped(attention),
        "partial_rotary_factor": attention.partial_rotary_factor,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm is not None,
        **experts_of_the_line(config, "glm4_moe", scoring_func="sigmoid", topk_method="noaux_tc"),
        "num_nextn_predict_layers": len(config.mtp_layers),
    }


def dots1(config: ModelConfig) -> Fields:
    no_extras(config, "dots1")
    attention, windows = windows_by_layer(config, "dots1")
    fixed(attention, "dots1", qk_norm="head", partial_rotary_factor=1.0, sinks=False, o_bias=attention.qkv_bias)
    return {
        **grouped(attention),
        "attention_bias": attention.qkv_bias,
        **windows,
        **experts_of_the_line(config, "dots1", scoring_func="sigmoid", topk_method="noaux_tc"),
    }
