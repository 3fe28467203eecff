"""Which block each part of a layer specification stands for."""

from __future__ import annotations

from typing import Any

from workbench.blocks.compressed_attention import CompressedAttention
from workbench.blocks.compressed_indexer import SparseCompressor
from workbench.blocks.compressor import HeavyCompressor
from workbench.blocks.feed_forward import SwiGLU
from workbench.blocks.grouped_query_attention import GroupedQueryAttention
from workbench.blocks.hash_router import HashRouter
from workbench.blocks.hyper_connected_layer import HyperConnectedLayer
from workbench.blocks.hyper_connections import HyperConnection
from workbench.blocks.latent_attention import LatentAttention
from workbench.blocks.mixture_of_experts import MixtureOfExperts
from workbench.blocks.rope import rotate_halves, rotate_interleaved
from workbench.blocks.router import Router
from workbench.blocks.sparse_latent_attention import SparseLatentAttention
from workbench.blocks.transformer_layer import TransformerLayer
from workbench.model import config as spec
from workbench.model.rotary import softmax_sharpening
from workbench_kernels.gated import SWIGLU, GatedActivation


def build_layer(
    config: spec.ModelConfig, layer: spec.LayerConfig, streams: spec.HyperConnections | None = None
) -> TransformerLayer:
    """The layer that a layer specification describes, between several residual `streams` if it is told of them."""
    parts: dict[str, Any] = {
        "attention": build_attention(config.hidden_size, layer.attention, eps=config.rms_norm_eps),
        "feed_forward": build_feed_forward(config.hidden_size, layer.feed_forward, vocab_size=config.vocab_size),
        "eps": config.rms_norm_eps,
    }
    if streams is None:
        return TransformerLayer(config.hidden_size, **parts)
    return HyperConnectedLayer(
        config.hidden_size,
        attn_hc=build_connection(config, streams),
        ffn_hc=build_connection(config, streams),
        **parts,
    )


def build_connection(config: spec.ModelConfig, streams: spec.HyperConnections) -> HyperConnection:
    """The connection of the streams to one sublayer."""
    return HyperConnection(
        config.hidden_size,
        streams.hc_mult,
        hc_sinkhorn_iters=streams.hc_sinkhorn_iters,
        hc_eps=streams.hc_eps,
        eps=config.rms_norm_eps,
    )


def build_attention(
    hidden_size: int, attention: spec.Attention, *, eps: float
) -> GroupedQueryAttention | LatentAttention | SparseLatentAttention | CompressedAttention:
    """The block that an attention specification describes; `eps` is that of the query and key norms."""
    rotate = rotate_interleaved if attention.rope.rope_interleave else rotate_halves
    match attention:
        case spec.GroupedQueryAttention():
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
                sliding_window=attention.sliding_window,
                sinks=attention.sinks,
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
            return CompressedAttention(
                hidden_size,
                attention.num_attention_heads,
                head_dim=attention.head_dim,
                q_lora_rank=attention.q_lora_rank,
                o_groups=attention.o_groups,
                o_lora_rank=attention.o_lora_rank,
                sliding_window=attention.sliding_window,
                softmax_scale=attention.head_dim**-0.5,
                compressor=build_compressor(hidden_size, attention, eps=eps),
                eps=eps,
            )


def build_compressor(
    hidden_size: int, attention: spec.CompressedAttention, *, eps: float
) -> HeavyCompressor | SparseCompressor | None:
    """What makes entries of the tokens before the window; None for the window alone."""
    match attention.compression:
        case spec.HeavyCompression(compress_ratio=ratio):
            return HeavyCompressor(hidden_size, attention.head_dim, compress_ratio=ratio, eps=eps)
        case spec.SparseCompression() as sparse:
            return SparseCompressor(
                hidden_size,
                attention.head_dim,
                q_lora_rank=attention.q_lora_rank,
                compress_ratio=sparse.compress_ratio,
                index_n_heads=sparse.index_n_heads,
                index_head_dim=sparse.index_head_dim,
                index_topk=sparse.index_topk,
                eps=eps,
            )
        case None:
            return None


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


def build_feed_forward(
    hidden_size: int, feed_forward: spec.FeedForward, *, vocab_size: int
) -> SwiGLU | MixtureOfExperts:
    """The block that a feed-forward specification describes."""
    match feed_forward:
        case spec.DenseFeedForward():
            return SwiGLU(hidden_size, feed_forward.intermediate_size)
        case spec.MixtureOfExperts():
            return MixtureOfExperts(
                hidden_size,
                feed_forward.moe_intermediate_size,
                n_routed_experts=feed_forward.n_routed_experts,
                shared_intermediate_size=feed_forward.n_shared_experts * feed_forward.moe_intermediate_size,
                router=build_router(hidden_size, feed_forward, vocab_size=vocab_size),
                expert_bias=feed_forward.expert_bias,
                activation=build_activation(feed_forward.activation),
            )


def build_activation(activation: spec.ClampedActivation | None) -> GatedActivation:
    """What stands between an expert's two products."""
    if activation is None:
        return SWIGLU
    return GatedActivation(activation.limit, activation.alpha, activation.offset)


def build_router(hidden_size: int, experts: spec.MixtureOfExperts, *, vocab_size: int) -> Router | HashRouter:
    """What chooses a token's experts: learned scores, or a table by the token's id."""
    shared: dict[str, Any] = {
        "num_experts_per_tok": experts.num_experts_per_tok,
        "scoring_func": experts.scoring_func,
        "norm_topk_prob": experts.norm_topk_prob,
        "routed_scaling_factor": experts.routed_scaling_factor,
    }
    if experts.topk_method == "hash":
        return HashRouter(hidden_size, experts.n_routed_experts, vocab_size=vocab_size, **shared)
    return Router(
        hidden_size,
        experts.n_routed_experts,
        n_group=experts.n_group,
        topk_group=experts.topk_group,
        group_score="top2" if experts.topk_method == "noaux_tc" else "max",
        bias=experts.router_bias,
        **shared,
    )
