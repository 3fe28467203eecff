"""The decoder: layers stacked on an embedding, with a head and any number of further prediction depths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.hyper_connections import HyperHead
from workbench.blocks.multi_token_prediction import MultiTokenPrediction
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation, rotation
from workbench.blocks.router import Routing
from workbench.blocks.sparse_latent_attention import SparseAttention
from workbench.model import config as spec
from workbench.model.build import build_layer
from workbench.model.decoder_cache import DecoderCache, LayerCache, build_cache
from workbench.model.initial import initialize
from workbench.model.rotary import rotary_frequencies, rotation_scale


class DecoderStates(NamedTuple):
    """One pass up to what the head reads.

    `hidden` is the last hidden state after the final norm, `mtp_hidden[k-1]` that of the k-th prediction depth (shorter
    by k, as the last k positions lack the token that the depth reads). `routing` has one entry per layer, MTP layers
    last, None where a layer has no experts. `reading` has what each layer with an indexer over tokens read (V3.2), MTP
    layers last; () of a pass with a cache.
    """

    hidden: Float[Tensor, "B T D"]
    mtp_hidden: tuple[Float[Tensor, "B _ D"], ...]
    routing: tuple[Routing | None, ...]
    reading: tuple[SparseAttention, ...]


class DecoderOutput(NamedTuple):
    """Everything a researcher wants to see of one pass; the rest is as in `DecoderStates`.

    `logits` predict the next token, `mtp_logits[k-1]` the token k+1 ahead.
    """

    logits: Float[Tensor, "B T V"]
    mtp_logits: tuple[Float[Tensor, "B _ V"], ...]
    routing: tuple[Routing | None, ...]
    hidden: Float[Tensor, "B T D"]
    reading: tuple[SparseAttention, ...] = ()


class Decoder(nn.Module):
    """A causal language model built from `config.layers`, with freshly drawn weights.

    Weights are drawn from the global torch generator: seed it first. Keys of the state dict are those of the model in
    `transformers` without their leading `model.` (experts stacked); MTP layers and selection biases have their own.
    """

    def __init__(self, config: spec.ModelConfig) -> None:
        super().__init__()
        self.config = config
        attentions = [layer.attention for layer in (*config.layers, *config.mtp_layers)]
        self.attentions = list(dict.fromkeys(attentions))
        self.attention_of_layer = [self.attentions.index(attention) for attention in attentions]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_layer(config, layer, config.hyper_connections) for layer in config.layers)
        self.hc_head = None
        if config.hyper_connections is not None:
            mult, hc_eps = config.hyper_connections.hc_mult, config.hyper_connections.hc_eps
            self.hc_head = HyperHead(config.hidden_size, mult, hc_eps=hc_eps, eps=config.rms_norm_eps)
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
        """Predict from `tokens`; see `states`."""
        states = self.states(tokens, cache, lookahead=lookahead)
        mtp_logits = tuple(self.lm_head(hidden_BTD) for hidden_BTD in states.mtp_hidden)
        return DecoderOutput(self.lm_head(states.hidden), mtp_logits, states.routing, states.hidden, states.reading)

    def states(
        self,
        tokens: Int[Tensor, "B T"],
        cache: DecoderCache | None = None,
        *,
        lookahead: Int[Tensor, "B M"] | None = None,
    ) -> DecoderStates:
        """Read `tokens`, which follow whatever `cache` holds, and stop before the head: a loss needs no logits.

        `lookahead` holds the tokens after the last, as many as there are prediction depths: with them every depth
        predicts at all T positions; without them depth k covers T-k. With a cache no depth runs.

        Raises:
            ValueError: more tokens than `max_position_embeddings`, or than the cache has room for.
        """
        first = 0 if cache is None else cache.length
        last, window = first + tokens.shape[1], self.config.max_position_embeddings
        spec.require(last <= window, f"{last} tokens are more than max_position_embeddings={window}")
        turns = self.rotations(torch.arange(first, last, device=tokens.device))
        hidden = self.embed_tokens(tokens)
        if self.config.hyper_connections is not None:  # every stream begins as the embedding
            hidden = hidden.unsqueeze(2).expand(-1, -1, self.config.hyper_connections.hc_mult, -1)
        routing: list[Routing | None] = []
        reading: list[SparseAttention] = []
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, turn, kept in zip(self.layers, turns[: len(self.layers)], caches, strict=True):
            hidden, layer_routing, layer_reading = layer(hidden, turn, kept, tokens)
            routing.append(layer_routing)
            if layer_reading is not None and cache is None:
                reading.append(layer_reading)
        hidden_BTD = self.norm(hidden if self.hc_head is None else self.hc_head(hidden))
        mtp_hidden: list[Tensor] = []
        if cache is None and len(self.mtp_layers) > 0:
            known = tokens if lookahead is None else torch.cat((tokens, lookahead), dim=1)
            mtp_hidden = self.read_further(hidden_BTD, known, turns[len(self.layers) :], routing, reading)
        return DecoderStates(hidden_BTD, tuple(mtp_hidden), tuple(routing), tuple(reading))

    def read_further(
        self,
        hidden: Float[Tensor, "B T D"],
        known: Int[Tensor, "B _"],
        turns: tuple[Rotation, ...],
        routing: list[Routing | None],
        reading: list[SparseAttention],
    ) -> list[Float[Tensor, "B _ D"]]:
        """Hidden states of every further depth; appends their layers' to `routing` and `reading`."""
        states = []
        for depth, (layer, turn) in enumerate(zip(self.mtp_layers, turns, strict=True), start=1):
            covered = min(hidden.shape[1], known.shape[1] - depth)
            if covered < 1:
                break
            embedding = self.embed_tokens(known[:, depth : depth + covered])
            covered_turn = Rotation(*(part[:covered] for part in turn))
            hidden, layer_routing, layer_reading = layer(hidden[:, :covered], embedding, covered_turn)
            states.append(hidden)
            routing.append(layer_routing)
            if layer_reading is not None:
                reading.append(layer_reading)
        return states

    def rotations(self, positions: Int[Tensor, " T"]) -> tuple[Rotation, ...]:
        """The turn at each position for every layer, MTP layers last; layers whose attention is the same share it."""
        dtype = torch.promote_types(self.embed_tokens.weight.dtype, torch.float32)
        turns = [
            rotation(
                positions,
                rotary_frequencies(attention, dtype, positions.device),
                scale=rotation_scale(attention.rope.scaling),
            )
            for attention in self.attentions
        ]
        return tuple(turns[i] for i in self.attention_of_layer)

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> DecoderCache:
        """An empty cache for `max_length` tokens of `batch_size` sequences, on the model's device.

        It holds what the main model's layers keep; `new_mtp_caches` makes those of the prediction depths.

        Raises:
            ValueError: a size is not above 0.
        """
        return DecoderCache(self._caches(self.config.layers, batch_size, max_length, dtype))

    def new_mtp_caches(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> list[LayerCache]:
        """An empty cache for every prediction depth; see `new_cache`."""
        return self._caches(self.config.mtp_layers, batch_size, max_length, dtype)

    def _caches(
        self, layers: tuple[spec.LayerConfig, ...], batch_size: int, max_length: int, dtype: torch.dtype | None
    ) -> list[LayerCache]:
        spec.require(batch_size > 0, f"batch_size={batch_size} must be above 0")
        spec.require(max_length > 0, f"max_length={max_length} must be above 0")
        weight = self.embed_tokens.weight
        place = {"dtype": dtype or weight.dtype, "device": weight.device}
        return [build_cache(layer.attention, batch_size, max_length, **place) for layer in layers]
