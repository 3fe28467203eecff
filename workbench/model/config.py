"""What a model is: a list of layers, each one attention and one feed-forward, as frozen plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.field_types import require_types
from workbench.model.attention_config import Attention as Attention
from workbench.model.attention_config import CompressedAttention as CompressedAttention
from workbench.model.attention_config import GroupedQueryAttention as GroupedQueryAttention
from workbench.model.attention_config import HeavyCompression as HeavyCompression
from workbench.model.attention_config import LatentAttention as LatentAttention
from workbench.model.attention_config import Llama3Scaling as Llama3Scaling
from workbench.model.attention_config import Rope as Rope
from workbench.model.attention_config import SparseCompression as SparseCompression
from workbench.model.attention_config import SparseLatentAttention as SparseLatentAttention
from workbench.model.attention_config import Yarn as Yarn
from workbench.model.codec import from_plain, to_plain
from workbench.model.feed_forward_config import ClampedActivation as ClampedActivation
from workbench.model.feed_forward_config import DenseFeedForward as DenseFeedForward
from workbench.model.feed_forward_config import FeedForward as FeedForward
from workbench.model.feed_forward_config import MixtureOfExperts as MixtureOfExperts
from workbench.model.require import require as require
from workbench.model.require import require_positive as require_positive


@dataclass(frozen=True)
class LayerConfig:
    """One transformer layer."""

    attention: Attention
    feed_forward: FeedForward

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True, kw_only=True)
class HyperConnections:
    """Manifold-constrained hyper-connections (mHC): `hc_mult` residual streams, mixed by doubly stochastic matrices.

    Source: arXiv 2512.24880; DeepSeek-V4, arXiv 2606.19348, section 2.2.
    """

    hc_mult: int
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "hc_mult", "hc_sinkhorn_iters")
        require(self.hc_eps > 0, f"hc_eps={self.hc_eps} must be above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: `layers` from the embedding up, then one `mtp_layers` entry per further predicted token.

    With `hyper_connections` the layers stand between several residual streams; prediction layers have one.

    `rms_norm_eps` is that of the layer norms; the norms inside latent attention keep their own 1e-6, as published.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    mtp_layers: tuple[LayerConfig, ...] = ()
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    hyper_connections: HyperConnections | None = None

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        require(len(self.layers) > 0, "layers=() must hold at least one layer")
        hashed = [i for i, x in enumerate(self.mtp_layers) if getattr(x.feed_forward, "topk_method", None) == "hash"]
        require(not hashed, f"mtp_layers{hashed[:1]} routes by token id; a prediction layer joins two tokens")
        require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps} must be above 0")
        require(self.initializer_range > 0, f"initializer_range={self.initializer_range} must be above 0")

    @property
    def num_nextn_predict_layers(self) -> int:
        """How many tokens beyond the next one the model predicts."""
        return len(self.mtp_layers)

    def expert_layers(self) -> tuple[tuple[str, MixtureOfExperts], ...]:
        """Name and specification of every layer that routes, from the bottom up, MTP layers last."""
        named = [(f"layer {i}", layer) for i, layer in enumerate(self.layers)]
        named += [(f"mtp {depth}", layer) for depth, layer in enumerate(self.mtp_layers, start=1)]
        return tuple((n, x.feed_forward) for n, x in named if isinstance(x.feed_forward, MixtureOfExperts))

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal configuration."""
        return json.dumps(to_plain(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown or missing field, or values that do not go together.
        """
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a model configuration: {error}") from None
        return from_plain(cls, plain)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """The model that a published `config.json` describes; see `workbench.model.published.from_hf`."""
        from workbench.model.published import from_hf

        return from_hf(source)
