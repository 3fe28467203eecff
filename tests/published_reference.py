"""What a class of `transformers` made of a configuration file, as ours: the second reading of each type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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


def rope_of(said: dict, *, interleave: bool = False, latent: bool = False) -> Rope:
    """`said` is a mapping of resolved rope parameters, in which nothing is left out but what has no default."""
    whole = ("original_max_position_embeddings", "truncate")
    said = {name: float(v) if type(v) is int and name not in whole else v for name, v in said.items()}
    kind = said["rope_type"]
    if kind == "default":
        return Rope(rope_theta=said["rope_theta"], rope_interleave=interleave)
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = Llama3Scaling(**{name: said[name] for name in names})
        return Rope(rope_theta=said["rope_theta"], rope_interleave=interleave, scaling=scaling)
    factor, mscale, all_dim = said["factor"], said.get("mscale") or None, said.get("mscale_all_dim") or None
    attention_factor = said.get("attention_factor")
    if not latent and attention_factor is None and mscale and all_dim:
        from workbench.blocks.rope import yarn_mscale

        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=said["original_max_position_embeddings"],
        beta_fast=said.get("beta_fast") or 32.0,
        beta_slow=said.get("beta_slow") or 1.0,
        mscale=mscale if latent else None,
        mscale_all_dim=all_dim if latent else None,
        attention_factor=attention_factor,
        truncate=said.get("truncate", True),
    )
    return Rope(rope_theta=said["rope_theta"], rope_interleave=interleave, scaling=yarn)


def around(hf: Any, layers: list[LayerConfig], **further: Any) -> ModelConfig:
    same = (
        "vocab_size",
        "hidden_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
    )
    return ModelConfig(layers=tuple(layers), **{name: getattr(hf, name) for name in same}, **further)


def grouped_of(hf: Any, **further: Any) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope=rope_of(hf.rope_parameters),
        **further,
    )


def latent_of(hf: Any, *, interleave: bool) -> LatentAttention:
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads")
    rope = rope_of(hf.rope_parameters, interleave=interleave, latent=True)
    return LatentAttention(rope=rope, **{name: getattr(hf, name) for name in names})


def sigmoid_of(hf: Any) -> MixtureOfExperts:
    names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    names += ("routed_scaling_factor",)
    may_be_null = {
        "n_group": hf.n_group or 1,
        "topk_group": hf.topk_group or 1,
        "norm_topk_prob": bool(hf.norm_topk_prob),
    }
    return MixtureOfExperts(**may_be_null, **{name: getattr(hf, name) for name in names})


def softmax_of(hf: Any, num_experts: int, inner: int, norm_topk_prob: bool, **further: Any) -> MixtureOfExperts:
    return MixtureOfExperts(
        n_routed_experts=num_experts,
        num_experts_per_tok=hf.num_experts_per_tok,
        moe_intermediate_size=inner,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=norm_topk_prob,
        **further,
    )


def dense_of(hf: Any) -> DenseFeedForward:
    return DenseFeedForward(intermediate_size=hf.intermediate_size)


def v2(hf: Any) -> ModelConfig:
    grouped = hf.topk_method == "group_limited_greedy"  # anything else is greedy
    experts = MixtureOfExperts(
        n_routed_experts=hf.n_routed_experts,
        num_experts_per_tok=hf.num_experts_per_tok,
        moe_intermediate_size=hf.moe_intermediate_size,
        n_shared_experts=hf.n_shared_experts,
        scoring_func="softmax",
        topk_method="group_limited_greedy" if grouped else "greedy",
        n_group=hf.n_group if grouped else 1,
        topk_group=hf.topk_group if grouped else 1,
        norm_topk_prob=False,
        routed_scaling_factor=hf.routed_scaling_factor,
    )
    attention = latent_of(hf, interleave=True)
    kinds = [dense_of(hf) if i < hf.first_k_dense_replace else experts for i in range(hf.num_hidden_layers)]
    return around(hf, [LayerConfig(attention, kind) for kind in kinds])


def v3(hf: Any) -> ModelConfig:
    attention, experts = latent_of(hf, interleave=bool(hf.rope_interleave)), sigmoid_of(hf)
    kinds = [dense_of(hf) if i < hf.first_k_dense_replace else experts for i in range(hf.num_hidden_layers)]
    mtp = (LayerConfig(attention, experts),) * hf.num_mtp_layers
    return around(hf, [LayerConfig(attention, kind) for kind in kinds], mtp_layers=mtp)


def v32(hf: Any) -> ModelConfig:
    attention = SparseLatentAttention(
        latent=latent_of(hf, interleave=True),
        index_n_heads=hf.index_n_heads,
        index_head_dim=hf.index_head_dim,
        index_topk=hf.index_topk,
    )
    experts = sigmoid_of(hf)
    kinds = [dense_of(hf) if kind == "dense" else experts for kind in hf.mlp_layer_types]
    mtp = (LayerConfig(attention, experts),) * getattr(hf, "num_nextn_predict_layers", 0)
    return around(hf, [LayerConfig(attention, kind) for kind in kinds], mtp_layers=mtp)


def v4(hf: Any) -> ModelConfig:
    names = ("num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank")
    sizes = {name: getattr(hf, name) for name in (*names, "sliding_window")}
    main, compressed = (
        rope_of(hf.rope_parameters[label], interleave=True, latent=True) for label in ("main", "compress")
    )
    sparse = SparseCompression(
        compress_ratio=hf.compress_rates["compressed_sparse_attention"],
        index_n_heads=hf.index_n_heads,
        index_head_dim=hf.index_head_dim,
        index_topk=hf.index_topk,
    )
    heavy = HeavyCompression(compress_ratio=hf.compress_rates["heavily_compressed_attention"])
    attentions = {
        "sliding_attention": CompressedAttention(rope=main, **sizes),
        "compressed_sparse_attention": CompressedAttention(rope=compressed, compression=sparse, **sizes),
        "heavily_compressed_attention": CompressedAttention(rope=compressed, compression=heavy, **sizes),
    }
    moe = MixtureOfExperts(
        n_routed_experts=hf.n_routed_experts,
        num_experts_per_tok=hf.num_experts_per_tok,
        moe_intermediate_size=hf.moe_intermediate_size,
        n_shared_experts=1,
        scoring_func=hf.scoring_func,
        topk_method="noaux_tc",
        routed_scaling_factor=hf.routed_scaling_factor,
        activation=ClampedActivation(limit=hf.swiglu_limit),
    )
    experts = {"moe": moe, "hash_moe": replace(moe, topk_method="hash")}
    layers = [LayerConfig(attentions[a], experts[f]) for a, f in zip(hf.layer_types, hf.mlp_layer_types, strict=True)]
    streams = HyperConnections(hc_mult=hf.hc_mult, hc_sinkhorn_iters=hf.hc_sinkhorn_iters, hc_eps=hf.hc_eps)
    return around(hf, layers, hyper_connections=streams)


def llama(hf: Any) -> ModelConfig:
    attention = grouped_of(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias)
    return around(hf, [LayerConfig(attention, dense_of(hf))] * hf.num_hidden_layers)


def windows_of(hf: Any, **further: Any) -> list[GroupedQueryAttention]:
    return [
        grouped_of(hf, sliding_window=hf.sliding_window if kind == "sliding_attention" else None, **further)
        for kind in hf.layer_types
    ]


def qwen2(hf: Any) -> ModelConfig:
    return around(hf, [LayerConfig(attention, dense_of(hf)) for attention in windows_of(hf, qkv_bias=True)])


def qwen3_moe(hf: Any) -> ModelConfig:
    bias = {"qkv_bias": hf.attention_bias, "o_bias": hf.attention_bias}
    attention = grouped_of(hf, qk_norm="head", sliding_window=hf.sliding_window, **bias)
    experts = softmax_of(hf, hf.num_experts, hf.moe_intermediate_size, hf.norm_topk_prob)
    sparse = [
        i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0 for i in range(hf.num_hidden_layers)
    ]
    return around(hf, [LayerConfig(attention, experts if routed else dense_of(hf)) for routed in sparse])


def glm4_moe(hf: Any) -> ModelConfig:
    attention = grouped_of(
        hf,
        qkv_bias=hf.attention_bias,
        qk_norm="head" if hf.use_qk_norm else None,
        partial_rotary_factor=hf.rope_parameters["partial_rotary_factor"],
    )
    experts = sigmoid_of(hf)
    kinds = [dense_of(hf) if i < hf.first_k_dense_replace else experts for i in range(hf.num_hidden_layers)]
    mtp = (LayerConfig(attention, experts),) * hf.num_mtp_layers
    return around(hf, [LayerConfig(attention, kind) for kind in kinds], mtp_layers=mtp)


def dots1(hf: Any) -> ModelConfig:
    attentions = windows_of(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, qk_norm="head")
    experts = sigmoid_of(hf)
    kinds = [dense_of(hf) if i < hf.first_k_dense_replace else experts for i in range(hf.num_hidden_layers)]
    return around(hf, [LayerConfig(a, kind) for a, kind in zip(attentions, kinds, strict=True)])


def mixtral(hf: Any) -> ModelConfig:
    attention = grouped_of(hf, sliding_window=hf.sliding_window)
    experts = softmax_of(hf, hf.num_local_experts, hf.intermediate_size, True)
    return around(hf, [LayerConfig(attention, experts)] * hf.num_hidden_layers)


def olmoe(hf: Any) -> ModelConfig:
    attention = grouped_of(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, qk_norm="full")
    experts = softmax_of(hf, hf.num_experts, hf.intermediate_size, hf.norm_topk_prob)
    return around(hf, [LayerConfig(attention, experts)] * hf.num_hidden_layers)


def gpt_oss(hf: Any) -> ModelConfig:
    attentions = windows_of(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, sinks=True)
    activation = ClampedActivation(limit=hf.swiglu_limit, alpha=hf.swiglu_alpha, offset=1.0)
    further = {"activation": activation, "router_bias": True, "expert_bias": True}
    experts = softmax_of(hf, hf.num_local_experts, hf.intermediate_size, True, **further)
    return around(hf, [LayerConfig(attention, experts) for attention in attentions])


READINGS: dict[str, Callable[[Any], ModelConfig]] = {
    "deepseek_v2": v2,
    "deepseek_v3": v3,
    "deepseek_v32": v32,
    "deepseek_v4": v4,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
    "dots1": dots1,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
}


def hf_config(plain: dict) -> Any:
    """The configuration object of `transformers` for the fields of a file."""
    from transformers import AutoConfig

    fields = {name: value for name, value in plain.items() if name not in ("_source", "model_type")}
    kind = plain["model_type"]
    return AutoConfig.for_model("deepseek_v3" if kind == "kimi_k2" else kind, **fields)
