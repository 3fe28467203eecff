"""The published configurations of the models that DeepSeek's are compared with."""

from __future__ import annotations

from dataclasses import replace

from workbench.model.config import (
    ClampedActivation,
    DenseFeedForward,
    LayerConfig,
    ModelConfig,
    require,
)
from workbench.model.hf_read.fields import Fields, common, rope_fields
from workbench.model.hf_read.neighbour_parts import FULL, SLIDING, by_layer, grouped, sigmoid_experts, softmax_experts


def llama(fields: Fields) -> ModelConfig:
    """Llama 2 and 3."""
    fields.only("mlp_bias", False)
    width = fields.integer("hidden_size", default=4096)
    window = fields.integer("max_position_embeddings", default=2048)
    biased = fields.flag("attention_bias", default=False)
    attention = grouped(fields, width, window, heads=32, key_value_heads=None)
    attention = replace(attention, qkv_bias=biased, o_bias=biased)
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=11008))
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=32000),
        hidden_size=width,
        layers=(LayerConfig(attention, dense),) * fields.integer("num_hidden_layers", default=32),
        max_position_embeddings=window,
        **common(fields),
    )


def qwen2(fields: Fields) -> ModelConfig:
    """Qwen2 and Qwen2.5: biases on queries, keys and values, whatever `attention_bias` says."""
    width = fields.integer("hidden_size", default=4096)
    window = fields.integer("max_position_embeddings", default=32768)
    attention = replace(grouped(fields, width, window, heads=32, key_value_heads=32), qkv_bias=True)
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=22016))
    num_layers = fields.integer("num_hidden_layers", default=32)
    sliding_window = fields.optional_integer("sliding_window", default=4096)
    if not fields.flag("use_sliding_window", default=False):
        sliding_window = None
    attentions = by_layer(fields, attention, num_layers, sliding_window, max_window_layers=28)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=151936),
        hidden_size=width,
        layers=tuple(LayerConfig(a, dense) for a in attentions),
        max_position_embeddings=window,
        **common(fields),
    )


def qwen3_moe(fields: Fields) -> ModelConfig:
    """Qwen3's mixtures: normed heads; with `use_sliding_window` every layer slides."""
    width = fields.integer("hidden_size", default=2048)
    window = fields.integer("max_position_embeddings", default=32768)
    biased = fields.flag("attention_bias", default=False)
    sliding = fields.flag("use_sliding_window", default=False)
    attention = replace(
        grouped(fields, width, window, heads=32, key_value_heads=4),
        qkv_bias=biased,
        o_bias=biased,
        qk_norm="head",
        sliding_window=fields.optional_integer("sliding_window", default=4096) if sliding else None,
    )
    experts = softmax_experts(
        fields,
        moe_intermediate_size=fields.integer("moe_intermediate_size", default=768),
        n_routed_experts=fields.integer("num_experts", "num_local_experts", default=128),
        num_experts_per_tok=8,
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
    )
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=6144))
    always_dense = set(fields.integers("mlp_only_layers") or ())
    step = fields.integer("decoder_sparse_step", default=1)
    require(step > 0, f"decoder_sparse_step={step} must be above 0")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=151936),
        hidden_size=width,
        layers=tuple(
            LayerConfig(attention, experts if i not in always_dense and (i + 1) % step == 0 else dense)
            for i in range(fields.integer("num_hidden_layers", default=24))
        ),
        max_position_embeddings=window,
        **common(fields),
    )


def glm4_moe(fields: Fields) -> ModelConfig:
    """GLM-4.5: V3's routing around grouped-query attention whose heads turn in part; the output has no bias.

    Further prediction depths are those that the file states, as for `deepseek_v3`.
    """
    width = fields.integer("hidden_size", default=4096)
    window = fields.integer("max_position_embeddings", default=131072)
    share = rope_fields(fields).optional_number("partial_rotary_factor")
    if share is None:
        share = fields.number("partial_rotary_factor", default=0.5)
    attention = replace(
        grouped(fields, width, window, heads=96, key_value_heads=8, turns_whole_heads=False),
        qkv_bias=fields.flag("attention_bias", default=False),
        qk_norm="head" if fields.flag("use_qk_norm", default=False) else None,
        partial_rotary_factor=share,
    )
    experts = sigmoid_experts(
        fields,
        n_routed_experts=fields.integer("n_routed_experts", "num_local_experts", default=128),
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=8),
        n_shared_experts=fields.integer("n_shared_experts", default=1),
        norm_topk_prob=fields.flag("norm_topk_prob", default=True),
    )
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=10944))
    sparse_from = fields.integer("first_k_dense_replace", default=1)
    num_layers = fields.integer("num_hidden_layers", default=46)
    depths = fields.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, null=0)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=151552),
        hidden_size=width,
        layers=tuple(LayerConfig(attention, experts if i >= sparse_from else dense) for i in range(num_layers)),
        mtp_layers=(LayerConfig(attention, experts),) * depths,
        max_position_embeddings=window,
        **common(fields, rms_norm_eps=1e-5),
    )


def dots1(fields: Fields) -> ModelConfig:
    """dots.llm1: V3's routing around attention with normed heads; layers from `max_window_layers` on slide."""
    width = fields.integer("hidden_size", default=4608)
    window = fields.integer("max_position_embeddings", default=2048)
    biased = fields.flag("attention_bias", default=False)
    attention = replace(
        grouped(fields, width, window, heads=32, key_value_heads=32), qkv_bias=biased, o_bias=biased, qk_norm="head"
    )
    num_layers = fields.integer("num_hidden_layers", default=62)
    sliding_window = fields.optional_integer("sliding_window", default=4096)
    attentions = by_layer(fields, attention, num_layers, sliding_window, max_window_layers=62)
    sparse_from = fields.integer("first_k_dense_replace", default=0)
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=10944))
    if sparse_from >= num_layers:
        feed_forwards = [dense] * num_layers
    else:
        experts = sigmoid_experts(
            fields,
            n_routed_experts=fields.integer("n_routed_experts", "num_local_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            n_shared_experts=fields.integer("n_shared_experts"),
            norm_topk_prob=fields.flag("norm_topk_prob", default=False, null=False),
        )
        feed_forwards = [experts if i >= sparse_from else dense for i in range(num_layers)]
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=152064),
        hidden_size=width,
        layers=tuple(LayerConfig(a, f) for a, f in zip(attentions, feed_forwards, strict=True)),
        max_position_embeddings=window,
        **common(fields),
    )


def mixtral(fields: Fields) -> ModelConfig:
    """Mixtral: the weights of the chosen experts always sum to 1; a `sliding_window` holds for every layer."""
    width = fields.integer("hidden_size", default=4096)
    window = fields.integer("max_position_embeddings", default=131072)
    attention = replace(
        grouped(fields, width, window, heads=32, key_value_heads=8, rope_theta=1e6),
        sliding_window=fields.optional_integer("sliding_window", default=None),
    )
    experts = softmax_experts(
        fields,
        moe_intermediate_size=fields.integer("intermediate_size", default=14336),
        n_routed_experts=fields.integer("num_local_experts", "num_experts", default=8),
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=32000),
        hidden_size=width,
        layers=(LayerConfig(attention, experts),) * fields.integer("num_hidden_layers", default=32),
        max_position_embeddings=window,
        **common(fields, rms_norm_eps=1e-5),
    )


def olmoe(fields: Fields) -> ModelConfig:
    """OLMoE: queries and keys are normed over all heads together."""
    for name in ("clip_qkv", "sliding_window"):
        fields.only(name, None)
    width = fields.integer("hidden_size", default=2048)
    window = fields.integer("max_position_embeddings", default=4096)
    biased = fields.flag("attention_bias", default=False)
    attention = replace(
        grouped(fields, width, window, heads=16, key_value_heads=None), qkv_bias=biased, o_bias=biased, qk_norm="full"
    )
    whole = attention.num_attention_heads * attention.head_dim
    require(whole == width, f"num_attention_heads x head_dim = {whole} must be hidden_size={width} ({fields.owner})")
    experts = softmax_experts(
        fields,
        moe_intermediate_size=fields.integer("intermediate_size", default=2048),
        n_routed_experts=fields.integer("num_experts", "num_local_experts", default=64),
        num_experts_per_tok=8,
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=50304),
        hidden_size=width,
        layers=(LayerConfig(attention, experts),) * fields.integer("num_hidden_layers", default=16),
        max_position_embeddings=window,
        **common(fields, rms_norm_eps=1e-5),
    )


def gpt_oss(fields: Fields) -> ModelConfig:
    """gpt-oss: sinks, windows in every other layer, biases everywhere, a clamped activation.

    Its softmax runs over the chosen logits alone, which is a softmax over all that is normalised again.
    """
    width = fields.integer("hidden_size", default=2880)
    window = fields.integer("max_position_embeddings", default=131072)
    biased = fields.flag("attention_bias", default=True)
    stretched = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    attention = replace(
        grouped(fields, width, window, heads=64, key_value_heads=8, head_dim=64, rope_theta=150_000.0, rope=stretched),
        qkv_bias=biased,
        o_bias=biased,
        sinks=True,
    )
    num_layers = fields.integer("num_hidden_layers", default=36)
    sliding_window = fields.optional_integer("sliding_window", default=128)
    alternating = [FULL if i % 2 else SLIDING for i in range(num_layers)]
    experts = softmax_experts(
        fields,
        moe_intermediate_size=fields.integer("intermediate_size", default=2880),
        n_routed_experts=fields.integer("num_local_experts", "num_experts", default=128),
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    alpha, limit = fields.number("swiglu_alpha", default=1.702), fields.number("swiglu_limit", default=7.0)
    activation = ClampedActivation(limit=limit, alpha=alpha, offset=1.0)
    experts = replace(experts, activation=activation, router_bias=True, expert_bias=True)
    attentions = by_layer(fields, attention, num_layers, sliding_window, otherwise=alternating)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=201088),
        hidden_size=width,
        layers=tuple(LayerConfig(a, experts) for a in attentions),
        max_position_embeddings=window,
        **common(fields, rms_norm_eps=1e-5),
    )
