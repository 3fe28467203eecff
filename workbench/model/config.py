"""What a model is: a list of layers, each one attention and one feed-forward, as frozen plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from workbench.model.codec import from_plain, to_plain


def require(holds: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `holds`."""
    if not holds:
        raise ValueError(message)


def require_positive(owner: Any, *names: str) -> None:
    """Raise `ValueError` naming the first of `owner`'s fields `names` that is not a whole number above zero."""
    for name in names:
        value = getattr(owner, name)
        require(type(value) is int and value > 0, f"{name}={value!r} must be a whole number above 0")


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretching RoPE beyond the window that it was trained on.

    `mscale` and `mscale_all_dim` are the published fields. Both present: cos and sin are scaled by the ratio of their
    two factors (1 when equal), and the softmax scale by the square of the latter's. Absent: cos and sin are scaled by
    the factor itself.

    Source: YaRN, arXiv 2309.00071; DeepSeek-V2, arXiv 2405.04434, section 3.1.4.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "original_max_position_embeddings")
        require(self.factor >= 1, f"factor={self.factor} must be at least 1")
        require(
            self.beta_fast > self.beta_slow > 0,
            f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and both above 0",
        )


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. `rope_interleave`: pairs are neighbours (DeepSeek), otherwise the two halves (Llama)."""

    rope_theta: float = 10_000.0
    rope_interleave: bool = False
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1")


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Query heads that share key/value heads: as many as heads is MHA, a single one is MQA."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads} must divide"
            f" num_attention_heads={self.num_attention_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even (RoPE turns pairs)")


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA); `q_lora_rank=None` leaves queries uncompressed."""

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope = Rope(rope_interleave=True)

    def __post_init__(self) -> None:
        require_positive(
            self, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        )
        if self.q_lora_rank is not None:
            require_positive(self, "q_lora_rank")
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")


@dataclass(frozen=True, kw_only=True)
class DenseFeedForward:
    """A SwiGLU every token passes through."""

    intermediate_size: int

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Routed SwiGLU experts, of which every token takes `num_experts_per_tok`, beside `n_shared_experts` that all take.

    `topk_method` is the published name of the choice: `greedy` takes the best experts, `group_limited_greedy` (V2)
    only within the `topk_group` groups with the best single expert, `noaux_tc` (V3) within the groups with the best
    two, all by scores plus a selection bias.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        require_positive(
            self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"
        )
        require(
            type(self.n_shared_experts) is int and self.n_shared_experts >= 0,
            f"n_shared_experts={self.n_shared_experts!r} must be a whole number, 0 or more",
        )
        for name, allowed in (
            ("scoring_func", ("softmax", "sigmoid")),
            ("topk_method", ("greedy", "group_limited_greedy", "noaux_tc")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} must be one of {', '.join(allowed)}")
        require(
            self.n_routed_experts % self.n_group == 0,
            f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts}",
        )
        require(
            self.topk_group <= self.n_group, f"topk_group={self.topk_group} must lie in 1..{self.n_group} (n_group)"
        )
        require(
            self.topk_method != "greedy" or self.n_group == 1,
            f"topk_method='greedy' knows no groups: n_group={self.n_group} must be 1",
        )
        group_size = self.n_routed_experts // self.n_group
        require(
            self.topk_method != "noaux_tc" or self.n_group == 1 or group_size >= 2,
            f"n_group={self.n_group} leaves groups of {group_size}; noaux_tc scores a group by its best two experts",
        )
        reachable = self.topk_group * group_size
        require(
            self.num_experts_per_tok <= reachable,
            f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..{reachable} (experts in topk_group groups)",
        )
        require(self.routed_scaling_factor > 0, f"routed_scaling_factor={self.routed_scaling_factor} must be above 0")


Attention = GroupedQueryAttention | LatentAttention
FeedForward = DenseFeedForward | MixtureOfExperts


@dataclass(frozen=True)
class LayerConfig:
    """One transformer layer."""

    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: `layers` from the embedding up, then one `mtp_layers` entry per further predicted token.

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

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        require(len(self.layers) > 0, "layers=() must hold at least one layer")
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
