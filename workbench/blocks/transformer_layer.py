"""One layer: attention, then feed-forward, each read through a norm and added to the residual stream."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.cache import KeyValueCache, LatentCache
from workbench.blocks.compressed_cache import CompressedCache
from workbench.blocks.float8_latent_cache import Float8LatentCache
from workbench.blocks.mixture_of_experts import MixtureOfExperts
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench.blocks.router import Routing
from workbench.blocks.sliding_cache import SlidingKeyValueCache
from workbench.blocks.sparse_latent_attention import SparseAttention, SparseLatentCache

LayerCache = (
    KeyValueCache | SlidingKeyValueCache | LatentCache | Float8LatentCache | SparseLatentCache | CompressedCache
)


class LayerOutput(NamedTuple):
    """The residual stream or streams after a layer, how its mixture routed, and what its sparse attention read.

    The latter two are None in a layer without experts, and in one whose attention has no indexer over tokens.
    """

    hidden: Float[Tensor, "B T *streams D"]
    routing: Routing | None
    reading: SparseAttention | None = None


class TransformerLayer(nn.Module):
    """hidden + attention(norm(hidden)), then that + feed_forward(norm(that)).

    Source: Xiong et al., arXiv 2002.04745 (norm before the sub-layer).
    """

    def __init__(self, hidden_size: int, *, attention: nn.Module, feed_forward: nn.Module, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=eps)
        self.mlp = feed_forward

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        turn: Rotation,
        cache: LayerCache | None = None,
        tokens: Int[Tensor, "B T"] | None = None,
    ) -> LayerOutput:
        """`tokens` are the ids, which only a hash router reads."""
        attended_BTD, reading = self.attend(hidden, turn, cache)
        hidden = hidden + attended_BTD
        further_BTD, routing = self.feed(hidden, tokens)
        return LayerOutput(hidden + further_BTD, routing, reading)

    def attend(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: LayerCache | None
    ) -> tuple[Float[Tensor, "B T D"], SparseAttention | None]:
        """What attention adds to the residual stream `x`, and what a sparse one read."""
        attended = self.self_attn(self.input_layernorm(x), turn, cache)
        return (attended.hidden, attended) if isinstance(attended, SparseAttention) else (attended, None)

    def feed(
        self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """What the feed-forward adds to the residual stream `x`, and how it routed."""
        normed_BTD = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            return self.mlp(normed_BTD, tokens)
        return self.mlp(normed_BTD), None
