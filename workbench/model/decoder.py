"""The decoder: layers stacked on an embedding, with a head and any number of further prediction depths."""

from __future__ import annotations

from typing import NamedTuple

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
    rotate_halves,
    rotate_interleaved,
    rotation,
    yarn_frequencies,
    yarn_mscale,
)
from workbench.blocks.router import Router, Routing
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

    def __init__(self, layers: list[KeyValueCache | LatentCache]) -> None:
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
        attention=build_attention(config.hidden_size, layer.attention),
        feed_forward=build_feed_forward(config.hidden_size, layer.feed_forward),
        eps=config.rms_norm_eps,
    )


def build_attention(hidden_size: int, attention: spec.Attention) -> GroupedQueryAttention | LatentAttention:
    """The block that an attention specification describes."""
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
            )
        case spec.LatentAttention():
            key_width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
            return LatentAttention(
                hidden_size,
                attention.num_attention_heads,
                q_lora_rank=attention.q_lora_rank,
                kv_lora_rank=attention.kv_lora_rank,
                qk_nope_head_dim=attention.qk_nope_head_dim,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                v_head_dim=attention.v_head_dim,
                softmax_scale=key_width**-0.5 * softmax_sharpening(attention.rope.scaling),
                rotate=rotate,
            )


def build_feed_forward(hidden_size: int, feed_forward: spec.FeedForward) -> SwiGLU | MixtureOfExperts:
    """The block that a feed-forward specification describes."""
    match feed_forward:
        case spec.DenseFeedForward():
            return SwiGLU(hidden_size, feed_forward.intermediate_size)
        case spec.MixtureOfExperts():
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
) -> KeyValueCache | LatentCache:
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


def rotary_frequencies(attention: spec.Attention, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " pairs"]:
    """Angle per position of every rotary pair of an attention."""
    rope = attention.rope
    width = attention.qk_rope_head_dim if isinstance(attention, spec.LatentAttention) else attention.head_dim
    if rope.scaling is None:
        return frequencies(width, rope.rope_theta, dtype=dtype, device=device)
    return yarn_frequencies(
        width,
        rope.rope_theta,
        factor=rope.scaling.factor,
        original_max_position_embeddings=rope.scaling.original_max_position_embeddings,
        beta_fast=rope.scaling.beta_fast,
        beta_slow=rope.scaling.beta_slow,
        dtype=dtype,
        device=device,
    )


def rotation_scale(yarn: spec.Yarn | None) -> float:
    """What YaRN multiplies cosines and sines by."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def softmax_sharpening(yarn: spec.Yarn | None) -> float:
    """What YaRN multiplies MLA's softmax scale by: the square of the factor from `mscale_all_dim`."""
    if yarn is None or not yarn.mscale_all_dim:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
