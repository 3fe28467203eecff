"""Parts of a published configuration that several types share, and what they demand of ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from workbench.model.attention_config import GroupedQueryAttention, LatentAttention, Llama3Scaling, Rope
from workbench.model.config import LayerConfig, ModelConfig
from workbench.model.feed_forward_config import DenseFeedForward, MixtureOfExperts
from workbench.model.require import require

Fields = dict[str, Any]
Kind = TypeVar("Kind")

PLAIN_EXPERTS: Fields = {"activation": None, "router_bias": False, "expert_bias": False}


def fixed(part: Any, model_type: str, **values: Any) -> None:
    """Refuse a part of a configuration in which a field differs from what the type holds it at."""
    for name, value in values.items():
        given = getattr(part, name)
        require(given == value, f"{model_type} has {name}={value!r} only; this configuration has {given!r}")


def same_attention(config: ModelConfig, kind: type[Kind], model_type: str) -> Kind:
    """The attention of all layers, which must be one and the same, without a layout of pairs of its own for GQA."""
    found = dict.fromkeys(layer.attention for layer in config.layers)
    require(len(found) == 1, f"{model_type} has the same attention in every layer; this configuration has {len(found)}")
    attention = next(iter(found))
    if not isinstance(attention, kind):
        raise ValueError(f"{model_type} has {kind.__name__}; this configuration has {type(attention).__name__}")
    if isinstance(attention, GroupedQueryAttention):
        fixed(attention.rope, model_type, rope_interleave=False)
    return attention


def windows_by_layer(config: ModelConfig, model_type: str) -> tuple[GroupedQueryAttention, Fields]:
    """The attention of all layers, which must be the same but for one width of window, and the fields for that."""
    windows = [getattr(layer.attention, "sliding_window", None) for layer in config.layers]
    widths = {window for window in windows if window is not None}
    require(len(widths) <= 1, f"{model_type} has one sliding_window; this configuration has {sorted(widths)}")
    layers = tuple(
        replace(layer, attention=replace(layer.attention, sliding_window=None))
        if isinstance(layer.attention, GroupedQueryAttention)
        else layer
        for layer in config.layers
    )
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    attention = same_attention(replace(config, layers=layers), GroupedQueryAttention, model_type)
    return attention, {"sliding_window": next(iter(widths), None), "layer_types": kinds}


def no_extras(config: ModelConfig, model_type: str, *, mtp: bool = False) -> None:
    """Refuse hyper-connections, and prediction layers unless they are like the last layer and `mtp` allows them."""
    fixed(config, model_type, hyper_connections=None)
    like_last = all(layer == config.layers[-1] for layer in config.mtp_layers)
    require(mtp or not config.mtp_layers, f"{model_type} has no prediction layers; mtp_layers must be ()")
    require(like_last, f"{model_type} has prediction layers like the last layer only")


def whole_heads(config: ModelConfig, attention: GroupedQueryAttention | LatentAttention, model_type: str) -> None:
    """Refuse a width that `transformers` refuses for the type."""
    heads = attention.num_attention_heads
    require(
        config.hidden_size % heads == 0,
        f"{model_type} has hidden_size a multiple of num_attention_heads; {config.hidden_size} is none of {heads}",
    )


def dense_width(layers: tuple[LayerConfig, ...], model_type: str) -> Fields:
    """The width of all dense layers among `layers`; nothing when there is none."""
    widths = {x.feed_forward.intermediate_size for x in layers if isinstance(x.feed_forward, DenseFeedForward)}
    require(len(widths) <= 1, f"{model_type} has one intermediate_size; this configuration has {sorted(widths)}")
    return {"intermediate_size": next(iter(widths))} if widths else {}


def same_experts(config: ModelConfig, model_type: str) -> MixtureOfExperts:
    """The mixture of all layers that route, which must be one and the same."""
    layers = [layer.feed_forward for layer in config.layers]
    found = dict.fromkeys(x for x in layers if isinstance(x, MixtureOfExperts))
    require(
        len(found) == 1, f"{model_type} has one mixture of experts for all layers; this configuration has {len(found)}"
    )
    return next(iter(found))


def no_dense(config: ModelConfig, model_type: str) -> None:
    """Refuse layers without experts."""
    routes = all(isinstance(layer.feed_forward, MixtureOfExperts) for layer in config.layers)
    require(routes, f"{model_type} has experts in every layer; this configuration has dense layers")


def softmax_experts(config: ModelConfig, model_type: str, **values: Any) -> MixtureOfExperts:
    """A mixture that takes the best by softmax, without groups, shared experts or anything else."""
    experts = same_experts(config, model_type)
    fixed(experts, model_type, scoring_func="softmax", topk_method="greedy", n_shared_experts=0)
    fixed(experts, model_type, routed_scaling_factor=1.0, **PLAIN_EXPERTS, **values)
    return experts


def experts_of_the_line(config: ModelConfig, model_type: str, **values: Any) -> Fields:
    """A mixture with shared experts and groups behind leading dense layers, as DeepSeek-V2 and V3 have it."""
    experts = same_experts(config, model_type)
    fixed(experts, model_type, **PLAIN_EXPERTS, **values)
    dense = [isinstance(layer.feed_forward, DenseFeedForward) for layer in config.layers]
    leading = sum(dense)
    require(all(dense[:leading]), f"{model_type} has its dense layers first")
    return {
        **dense_width(config.layers, model_type),
        "first_k_dense_replace": leading,
        "moe_intermediate_size": experts.moe_intermediate_size,
        "n_routed_experts": experts.n_routed_experts,
        "n_shared_experts": experts.n_shared_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "scoring_func": experts.scoring_func,
        "topk_method": experts.topk_method,
        "n_group": experts.n_group,
        "topk_group": experts.topk_group,
        "norm_topk_prob": experts.norm_topk_prob,
        "routed_scaling_factor": experts.routed_scaling_factor,
    }


def grouped(attention: GroupedQueryAttention) -> Fields:
    """Heads and positions of grouped-query attention."""
    return {
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        **positions(attention.rope),
    }


def latent(attention: LatentAttention) -> Fields:
    """Heads, ranks and positions of latent attention."""
    return {
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
        **positions(attention.rope),
    }


def positions(rope: Rope) -> Fields:
    """Base and stretching of rotary positions; absent numbers stay absent."""
    if rope.scaling is None:
        return {"rope_theta": rope.rope_theta, "rope_scaling": None}
    kind = "llama3" if isinstance(rope.scaling, Llama3Scaling) else "yarn"
    numbers = {name: value for name, value in vars(rope.scaling).items() if value is not None}
    return {"rope_theta": rope.rope_theta, "rope_scaling": {"rope_type": kind, **numbers}}
