"""Which block each part of a layer specification stands for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from workbench.blocks.feed_forward import SwiGLU
from workbench.blocks.grouped_query_attention import GroupedQueryAttention
from workbench.blocks.latent_attention import LatentAttention
from workbench.blocks.mixture_of_experts import MixtureOfExperts
from workbench.blocks.rope import rotate_halves, rotate_interleaved
from workbench.blocks.router import Router
from workbench.blocks.sparse_latent_attention import SparseLatentAttention
from workbench.blocks.transformer_layer import TransformerLayer
from workbench.model import config as spec
from workbench.model.rotary import softmax_sharpening


def build_layer(config: spec.ModelConfig, layer: spec.LayerConfig) -> TransformerLayer:
    """The transformer layer that a layer specification describes."""
    return TransformerLayer(
        config.hidden_size,
        attention=build_attention(config.hidden_size, layer.attention, eps=config.rms_norm_eps),
        feed_forward=build_feed_forward(config.hidden_size, layer.feed_forward),
        eps=config.rms_norm_eps,
    )


def build_attention(
    hidden_size: int, attention: spec.Attention, *, eps: float
) -> GroupedQueryAttention | LatentAttention | SparseLatentAttention:
    """The block that an attention specification describes; `eps` is that of the query and key norms.

    Raises:
        ValueError: the decoder has no block for it yet.
    """
    rotate = rotate_interleaved if attention.rope.rope_interleave else rotate_halves
    match attention:
        case spec.GroupedQueryAttention():
            refuse_extras(attention, ("sliding_window", "sinks"))
            return GroupedQueryAttention(
                hidden_size,
                attention.num_attention_heads,
                num_key_value_heads=attention.num_key_value_heads,
                head_dim=attention.head_dim,
                softmax_scale=attention.head_dim**-0.5,
                rotate=rotate,
                rotary_width=attention.rotary_width,
                qkv_bias=attention.qkv_bias,
                o_bias=attention.o_bias,
                qk_norm=attention.qk_norm,
                eps=eps,
            )
        case spec.LatentAttention() as latent:
            return LatentAttention(hidden_size, latent.num_attention_heads, **latent_arguments(latent))
        case spec.SparseLatentAttention(latent=latent):
            arguments = latent_arguments(latent)
            assert arguments["q_lora_rank"] is not None
            return SparseLatentAttention(
                hidden_size,
                latent.num_attention_heads,
                **arguments,
                index_n_heads=attention.index_n_heads,
                index_head_dim=attention.index_head_dim,
                index_topk=attention.index_topk,
            )
        case spec.CompressedAttention():
            raise ValueError("the decoder does not build CompressedAttention yet; its block can be used by itself")


def latent_arguments(latent: spec.LatentAttention) -> dict[str, Any]:
    """What latent attention, sparse or not, is built from."""
    key_width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "softmax_scale": key_width**-0.5 * softmax_sharpening(latent.rope.scaling),
        "rotate": rotate_interleaved if latent.rope.rope_interleave else rotate_halves,
    }


def refuse_extras(part: spec.GroupedQueryAttention | spec.MixtureOfExperts, names: tuple[str, ...]) -> None:
    """Raise `ValueError` in one line if a field that the decoder does not build yet is set."""
    defaults = {field.name: field.default for field in fields(part)}
    for name in names:
        value = getattr(part, name)
        spec.require(
            value == defaults[name], f"the decoder does not build {name}={value!r} yet ({type(part).__name__})"
        )


def build_feed_forward(hidden_size: int, feed_forward: spec.FeedForward) -> SwiGLU | MixtureOfExperts:
    """The block that a feed-forward specification describes."""
    match feed_forward:
        case spec.DenseFeedForward():
            return SwiGLU(hidden_size, feed_forward.intermediate_size)
        case spec.MixtureOfExperts():
            refuse_extras(feed_forward, ("activation", "router_bias", "expert_bias"))
            spec.require(feed_forward.topk_method != "hash", "the decoder does not build topk_method='hash' yet")
            router = Router(
                hidden_size,
                feed_forward.n_routed_experts,
                num_experts_per_tok=feed_forward.num_experts_per_tok,
                scoring_func=feed_forward.scoring_func,
                n_group=feed_forward.n_group,
                topk_group=feed_forward.topk_group,
                group_score="top2" if feed_forward.topk_method == "noaux_tc" else "max",
                norm_topk_prob=feed_forward.norm_topk_prob,
                routed_scaling_factor=feed_forward.routed_scaling_factor,
            )
            return MixtureOfExperts(
                hidden_size,
                feed_forward.moe_intermediate_size,
                n_routed_experts=feed_forward.n_routed_experts,
                shared_intermediate_size=feed_forward.n_shared_experts * feed_forward.moe_intermediate_size,
                router=router,
            )
