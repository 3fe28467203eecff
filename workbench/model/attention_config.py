"""What an attention is: frozen plain data, one class per kind, with the field names of the published configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.field_types import require_types
from workbench.model.require import require, require_positive


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretching RoPE beyond the window that it was trained on.

    `mscale` and `mscale_all_dim` are the published fields. Both present: cos and sin are scaled by the ratio of their
    two factors (1 when equal), and the softmax scale by the square of the latter's. Absent: cos and sin are scaled by
    the factor itself, unless `attention_factor` gives another number. `truncate` rounds the ramp's ends to whole pairs.

    Source: YaRN, arXiv 2309.00071; DeepSeek-V2, arXiv 2405.04434, section 3.1.4.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "original_max_position_embeddings")
        require(self.factor >= 1, f"factor={self.factor} must be at least 1")
        require(
            self.beta_fast >= self.beta_slow > 0,
            f"beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}, and both above 0",
        )


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Stretching RoPE as Llama 3.1 does: slow pairs by `factor`, fast ones not at all, a ramp between.

    Source: the rope type `llama3` of published configurations; Llama 3, arXiv 2407.21783, section 3.4.2.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "original_max_position_embeddings")
        require(self.factor >= 1, f"factor={self.factor} must be at least 1")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}, "
            "and both above 0",
        )


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. `rope_interleave`: pairs are neighbours (DeepSeek), otherwise the two halves (Llama)."""

    rope_theta: float = 10_000.0
    rope_interleave: bool = False
    scaling: Yarn | Llama3Scaling | None = None

    def __post_init__(self) -> None:
        require_types(self)
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1")


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Query heads that share key/value heads: as many as heads is MHA, a single one is MQA.

    `qk_norm` normalises queries and keys before RoPE: each head by itself, or all heads of a token together ("full").
    `partial_rotary_factor` is the leading share of `head_dim` that turns. With `sliding_window` a query sees itself and
    the window - 1 tokens before. `sinks` are learned logits, one per head, that take attention and give nothing.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope = Rope()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads} must divide"
            f" num_attention_heads={self.num_attention_heads}",
        )
        require(self.qk_norm in (None, "head", "full"), f"qk_norm={self.qk_norm!r} must be None, 'head' or 'full'")
        require(
            0 < self.partial_rotary_factor <= 1,
            f"partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1]",
        )
        require(
            self.rotary_width > 0 and self.rotary_width % 2 == 0,
            f"head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} must give an even number"
            " above 0 (RoPE turns pairs)",
        )
        if self.sliding_window is not None:
            require_positive(self, "sliding_window")

    @property
    def rotary_width(self) -> int:
        """How many leading numbers of a head RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)


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
        require_types(self)
        require_positive(
            self, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        )
        if self.q_lora_rank is not None:
            require_positive(self, "q_lora_rank")
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")


@dataclass(frozen=True, kw_only=True)
class SparseLatentAttention:
    """Latent attention to the `index_topk` past tokens that a lightning indexer scores highest (DeepSeek-V3.2).

    The indexer's positional part has the width of the latent's, in the half layout.
    """

    latent: LatentAttention
    index_n_heads: int
    index_head_dim: int
    index_topk: int

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "index_n_heads", "index_head_dim", "index_topk")
        require(self.latent.q_lora_rank is not None, "q_lora_rank=None: the indexer reads the compressed query")
        require(
            self.index_head_dim >= self.latent.qk_rope_head_dim,
            f"index_head_dim={self.index_head_dim} must be at least"
            f" qk_rope_head_dim={self.latent.qk_rope_head_dim}, its positional part",
        )

    @property
    def rope(self) -> Rope:
        """The positions of both, apart from the layout of the pairs."""
        return self.latent.rope

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.latent.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class HeavyCompression:
    """One entry for every `compress_ratio` tokens, all of them read."""

    compress_ratio: int

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "compress_ratio")


@dataclass(frozen=True, kw_only=True)
class SparseCompression:
    """One entry for every `compress_ratio` tokens, pooled from twice as many; an indexer picks `index_topk` of them."""

    compress_ratio: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "compress_ratio", "index_n_heads", "index_head_dim", "index_topk")


@dataclass(frozen=True, kw_only=True)
class CompressedAttention:
    """DeepSeek-V4's attention: a sliding window of tokens, and compressed entries of everything before.

    All query heads share one head that is key and value at once; its last `qk_rope_head_dim` numbers turn. Without
    `compression` there is the window alone. The output is turned back and projected in `o_groups` groups of heads.
    """

    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compression: HeavyCompression | SparseCompression | None = None
    rope: Rope = Rope(rope_interleave=True)

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(
            self,
            "num_attention_heads",
            "head_dim",
            "qk_rope_head_dim",
            "q_lora_rank",
            "o_groups",
            "o_lora_rank",
            "sliding_window",
        )
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        require(
            self.qk_rope_head_dim <= self.head_dim,
            f"qk_rope_head_dim={self.qk_rope_head_dim} must lie in 2..{self.head_dim} (head_dim)",
        )
        require(
            self.num_attention_heads % self.o_groups == 0,
            f"o_groups={self.o_groups} must divide num_attention_heads={self.num_attention_heads}",
        )
        if isinstance(self.compression, SparseCompression):
            require(
                self.qk_rope_head_dim <= self.compression.index_head_dim,
                f"index_head_dim={self.compression.index_head_dim} must be at least"
                f" qk_rope_head_dim={self.qk_rope_head_dim}, its positional part",
            )


Attention = GroupedQueryAttention | LatentAttention | SparseLatentAttention | CompressedAttention
