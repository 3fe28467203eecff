"""How many bytes a model keeps of the past, as arithmetic on its configuration; no tensor is made."""

from __future__ import annotations

from typing import Literal

from workbench.model.config import (
    Attention,
    CompressedAttention,
    GroupedQueryAttention,
    LatentAttention,
    ModelConfig,
    SparseCompression,
    SparseLatentAttention,
    require,
)

Precision = Literal["float32", "bfloat16", "float16", "float8", "float8_index4"]
BYTES_PER_ELEMENT: dict[Precision, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8": 1,
    "float8_index4": 1,
}
FLOAT8_BLOCK = 128


def cache_bytes(config: ModelConfig, context: int, precision: Precision = "bfloat16") -> int:
    """Bytes that the cache of one sequence of `context` tokens takes in the main model's layers.

    A sliding window keeps its last tokens and no more; a compressed entry is kept once its tokens are complete. The
    tokens that wait to be pooled (a constant, fewer than twice the ratio) are not counted.

    `float8` is DeepSeek's layout: latents, keys and values in FP8 with a float32 scale for every 128 numbers of a
    vector, the positional part of a latent in BF16, index keys like latents. V4's entries are counted as published,
    without their scales. `float8_index4` is the same with index keys in FP4, half a byte a number without scales.

    Raises:
        ValueError: `context` is negative or `precision` unknown.

    Source: FlashMLA's layout of 656 bytes a token; DeepSeek-V3.2; DeepSeek-V4, arXiv 2606.19348.
    """
    require(context >= 0, f"context={context} must be 0 or more")
    known = ", ".join(BYTES_PER_ELEMENT)
    require(precision in BYTES_PER_ELEMENT, f"precision={precision!r} must be one of {known}")
    return sum(attention_cache_bytes(layer.attention, context, precision) for layer in config.layers)


def attention_cache_bytes(attention: Attention, context: int, precision: Precision) -> int:
    """Bytes that one layer keeps of `context` tokens."""
    match attention:
        case GroupedQueryAttention():
            kept = context if attention.sliding_window is None else min(context, attention.sliding_window)
            return kept * 2 * attention.num_key_value_heads * vector_bytes(attention.head_dim, precision)
        case LatentAttention():
            rope = attention.qk_rope_head_dim * rope_bytes_per_element(precision)
            return context * (vector_bytes(attention.kv_lora_rank, precision) + rope)
        case SparseLatentAttention():
            index = index_key_bytes(attention.index_head_dim, precision, scaled=True)
            return attention_cache_bytes(attention.latent, context, precision) + context * index
        case CompressedAttention():
            rotary = attention.qk_rope_head_dim
            entry = vector_bytes(attention.head_dim - rotary, precision, scaled=False)
            entry += rotary * rope_bytes_per_element(precision)
            kept = min(context, attention.sliding_window) * entry
            if attention.compression is not None:
                entries = context // attention.compression.compress_ratio
                kept += entries * entry
                if isinstance(attention.compression, SparseCompression):
                    width = attention.compression.index_head_dim
                    kept += entries * index_key_bytes(width, precision, scaled=False)
            return kept


def vector_bytes(width: int, precision: Precision, *, scaled: bool = True) -> int:
    """Bytes of one vector, with its scales when it is in FP8 and `scaled`."""
    scales = -(-width // FLOAT8_BLOCK) if scaled and precision in ("float8", "float8_index4") else 0
    return width * BYTES_PER_ELEMENT[precision] + 4 * scales


def index_key_bytes(width: int, precision: Precision, *, scaled: bool) -> int:
    """Bytes of one key of an indexer."""
    return -(-width // 2) if precision == "float8_index4" else vector_bytes(width, precision, scaled=scaled)


def rope_bytes_per_element(precision: Precision) -> int:
    """The positional part of a latent stays in BF16 when the rest is narrower."""
    return max(2, BYTES_PER_ELEMENT[precision])


def cache_elements_per_token(attention: Attention) -> int:
    """Numbers that one layer writes of every token; compressed entries, one for several tokens, come on top."""
    match attention:
        case GroupedQueryAttention():
            return 2 * attention.num_key_value_heads * attention.head_dim
        case LatentAttention():
            return attention.kv_lora_rank + attention.qk_rope_head_dim
        case SparseLatentAttention():
            return cache_elements_per_token(attention.latent) + attention.index_head_dim
        case CompressedAttention():
            return attention.head_dim
