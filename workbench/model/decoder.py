"""The decoder: layers stacked on an embedding, with a head and any number of further prediction depths."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.cache import KeyValueCache, LatentCache
from workbench.blocks.feed_forward import SwiGLU
from workbench.blocks.grouped_query_attention import GroupedQueryAttention
from workbench.blocks.latent_attention import LatentAttention
from workbench.blocks.mixture_of_experts import MixtureOfExperts
from workbench.blocks.multi_token_prediction import MultiTokenPrediction
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import (
    Rotation,
    frequencies,
    llama3_frequencies,
    rotate_halves,
    rotate_interleaved,
    rotation,
    yarn_frequencies,
    yarn_mscale,
)
from workbench.blocks.router import Router, Routing
from workbench.blocks.sparse_latent_attention import SparseLatentAttention, SparseLatentCache
from workbench.blocks.transformer_layer import TransformerLayer
from workbench.model import config as spec
from workbench.model.initial import initialize


class DecoderOutput(NamedTuple):
    """Everything a researcher wants to see of one pass.

    `logits` predict the next token; `mtp_logits[k-1]` the token k+1 ahead, from the k-th depth (shorter by k, as the
    last k positions lack the token that the depth reads). `routing` has one entry per layer, MTP layers last, None
    where a layer has no experts. `hidden` is the last hidden state after the final norm.
    """

    logits: Float[Tensor, "B T V"]
    mtp_logits: tuple[Float[Tensor, "B _ V"], ...]
    routing: tuple[Routing | None, ...]
    hidden: Float[Tensor, "B T D"]


class DecoderCache:
    """One cache per layer of the main model; `length` tokens are kept so far."""

    def __init__(self, layers: list[KeyValueCache | LatentCache | SparseLatentCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Tokens kept so far."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of all layers occupy, measured from the tensors."""
        return sum(layer.nbytes for layer in self.layers)


class Decoder(nn.Module):
    """A causal language model built from `config.layers`, with freshly drawn weights.

    Weights are drawn from the global torch generator: seed it first. Keys of the state dict are those of the model in
    `transformers` without their leading `model.` (experts stacked); MTP layers and selection biases have their own.
    """

    def __init__(self, config: spec.ModelConfig) -> None:
        super().__init__()
        spec.require(config.hyper_connections is None, "the decoder does not build hyper_connections yet")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_layer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp_layers = nn.ModuleList(
            MultiTokenPrediction(config.hidden_size, build_layer(config, layer), eps=config.rms_norm_eps)
            for layer in config.mtp_layers
        )
        initialize(self, std=config.initializer_range)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: DecoderCache | None = None,
        *,
        lookahead: Int[Tensor, "B M"] | None = None,
    ) -> DecoderOutput:
        """Predict from `tokens`, which follow whatever `cache` holds.

        `lookahead` holds the tokens after the last, as many as there are prediction depths: with them every depth
        predicts at all T positions; without them depth k covers T-k. With a cache no depth runs.

        Raises:
            ValueError: more tokens than `max_position_embeddings`, or than the cache has room for.
        """
        first = 0 if cache is None else cache.length
        last, window = first + tokens.shape[1], self.config.max_position_embeddings
        spec.require(last <= window, f"{last} tokens are more than max_position_embeddings={window}")
        turns = self.rotations(torch.arange(first, last, device=tokens.device))
        hidden_BTD = self.embed_tokens(tokens)
        routing: list[Routing | None] = []
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_spec, kept in zip(self.layers, self.config.layers, caches, strict=True):
            hidden_BTD, layer_routing = layer(hidden_BTD, turns[layer_spec.attention], kept)
            routing.append(layer_routing)
        hidden_BTD = self.norm(hidden_BTD)
        mtp_logits: list[Tensor] = []
        if cache is None and len(self.mtp_layers) > 0:
            known = tokens if lookahead is None else torch.cat((tokens, lookahead), dim=1)
            mtp_logits = self.predict_further(hidden_BTD, known, turns, routing)
        return DecoderOutput(self.lm_head(hidden_BTD), tuple(mtp_logits), tuple(routing), hidden_BTD)

    def predict_further(
        self,
        hidden: Float[Tensor, "B T D"],
        known: Int[Tensor, "B _"],
        turns: dict[spec.Attention, Rotation],
        routing: list[Routing | None],
    ) -> list[Float[Tensor, "B _ V"]]:
        """Logits of every further depth; appends how their layers routed to `routing`."""
        logits = []
        for depth, (layer, layer_spec) in enumerate(zip(self.mtp_layers, self.config.mtp_layers, strict=True), start=1):
            covered = min(hidden.shape[1], known.shape[1] - depth)
            if covered < 1:
                break
            embedding = self.embed_tokens(known[:, depth : depth + covered])
            turn = Rotation(*(part[:covered] for part in turns[layer_spec.attention]))
            hidden, layer_routing = layer(hidden[:, :covered], embedding, turn)
            logits.append(self.lm_head(hidden))
            routing.append(layer_routing)
        return logits

    def rotations(self, positions: Int[Tensor, " T"]) -> dict[spec.Attention, Rotation]:
        """The turn at each position for every attention that the layers use."""
        dtype = torch.promote_types(self.embed_tokens.weight.dtype, torch.float32)
        turns: dict[spec.Attention, Rotation] = {}
        for attention in {layer.attention for layer in (*self.config.layers, *self.config.mtp_layers)}:
            angles_per_position = rotary_frequencies(attention, dtype, positions.device)
            turns[attention] = rotation(positions, angles_per_position, scale=rotation_scale(attention.rope.scaling))
        return turns

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> DecoderCache:
        """An empty cache for `max_length` tokens of `batch_size` sequences, on the model's device.

        Raises:
            ValueError: a size is not above 0.
        """
        spec.require(batch_size > 0, f"batch_size={batch_size} must be above 0")
        spec.require(max_length > 0, f"max_length={max_length} must be above 0")
        weight = self.embed_tokens.weight
        place = {"dtype": dtype or weight.dtype, "device": weight.device}
        return DecoderCache([build_cache(x.attention, batch_size, max_length, **place) for x in self.config.layers])


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


def build_cache(
    attention: spec.Attention,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> KeyValueCache | LatentCache | SparseLatentCache:
    """The cache that an attention specification needs."""
    match attention:
        case spec.GroupedQueryAttention():
            heads = attention.num_key_value_heads
            return KeyValueCache(
                batch_size, max_length, num_heads=heads, head_dim=attention.head_dim, dtype=dtype, device=device
            )
        case spec.LatentAttention():
            return LatentCache(
                batch_size,
                max_length,
                kv_lora_rank=attention.kv_lora_rank,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                dtype=dtype,
                device=device,
            )
        case spec.SparseLatentAttention(latent=latent):
            return SparseLatentCache(
                batch_size,
                max_length,
                kv_lora_rank=latent.kv_lora_rank,
                qk_rope_head_dim=latent.qk_rope_head_dim,
                index_head_dim=attention.index_head_dim,
                dtype=dtype,
                device=device,
            )
        case spec.CompressedAttention():
            raise ValueError("the decoder does not build CompressedAttention yet")


def rotary_frequencies(attention: spec.Attention, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " pairs"]:
    """Angle per position of every rotary pair of an attention."""
    rope, width = attention.rope, rotary_width(attention)
    place = {"dtype": dtype, "device": device}
    match rope.scaling:
        case spec.Yarn() as yarn:
            return yarn_frequencies(
                width,
                rope.rope_theta,
                factor=yarn.factor,
                original_max_position_embeddings=yarn.original_max_position_embeddings,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
                truncate=yarn.truncate,
                **place,
            )
        case spec.Llama3Scaling() as llama3:
            return llama3_frequencies(
                width,
                rope.rope_theta,
                factor=llama3.factor,
                low_freq_factor=llama3.low_freq_factor,
                high_freq_factor=llama3.high_freq_factor,
                original_max_position_embeddings=llama3.original_max_position_embeddings,
                **place,
            )
        case None:
            return frequencies(width, rope.rope_theta, **place)


def rotary_width(attention: spec.Attention) -> int:
    """How many numbers of a head turn with the position."""
    match attention:
        case spec.GroupedQueryAttention():
            return attention.rotary_width
        case spec.SparseLatentAttention(latent=latent):
            return latent.qk_rope_head_dim
        case _:
            return attention.qk_rope_head_dim


def rotation_scale(scaling: spec.Yarn | spec.Llama3Scaling | None) -> float:
    """What YaRN multiplies cosines and sines by."""
    if not isinstance(scaling, spec.Yarn):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def softmax_sharpening(scaling: spec.Yarn | spec.Llama3Scaling | None) -> float:
    """What YaRN multiplies MLA's softmax scale by: the square of the factor from `mscale_all_dim`."""
    if not isinstance(scaling, spec.Yarn) or not scaling.mscale_all_dim:
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
