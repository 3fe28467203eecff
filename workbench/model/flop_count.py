"""How many floating-point operations a token takes, as arithmetic on a configuration; no tensor is made."""

from __future__ import annotations

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
from workbench.model.parameter_count import parameters


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward of the main model: 6 per active parameter (without the input embedding), plus attention.

    A causal query meets half the context on average, or less where a window or the indexer's choice ends it. A latent
    is counted as each head's own keys and values, an indexer like the rest of the model, forward and backward. What
    softmax, pooling and the mixing of residual streams do beyond their matrices is not counted.

    Source: checked against the published figures of DeepSeek-V2 and V3, arXiv 2505.09343, table 2.
    """
    require(context >= 1, f"context={context} must be 1 or more")
    attention = sum(mean_multiplications(layer.attention, context) for layer in config.layers)
    return 6.0 * parameters(config).active_without_embedding + 6.0 * attention


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward of one new token among `context` that it sees, itself included: 2 per active parameter, plus attention.

    Latent attention is counted in its absorbed form, in which each head reads the cached latent itself. Windows, the
    indexer's choice and compressed entries limit what is read; an indexer looks at all of its keys.
    """
    require(context >= 0, f"context={context} must be 0 or more")
    attention = sum(decode_multiplications(layer.attention, context) for layer in config.layers)
    return 2.0 * parameters(config).active_without_embedding + 2.0 * attention


def query_key_value_width(attention: Attention) -> int:
    """Multiplications per query and visible key, over all heads: key width for the score, value width for the mix."""
    match attention:
        case GroupedQueryAttention() | CompressedAttention():
            return attention.num_attention_heads * 2 * attention.head_dim
        case LatentAttention():
            per_head = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
            return attention.num_attention_heads * per_head
        case SparseLatentAttention():
            return query_key_value_width(attention.latent)


def absorbed_width(attention: LatentAttention) -> int:
    """The same where each head reads the latent itself."""
    return attention.num_attention_heads * (2 * attention.kv_lora_rank + attention.qk_rope_head_dim)


def mean_keys(count: float, most: int | None) -> float:
    """Of `count` keys that appear one after the other, how many a query sees on average, if `most` at a time."""
    if most is None or most >= count:
        return count / 2
    return most - most * most / (2 * count)


def mean_multiplications(attention: Attention, context: int) -> float:
    """Multiplications of one query's attention, on average over a sequence of `context` tokens."""
    width, length = query_key_value_width(attention), float(context)
    match attention:
        case GroupedQueryAttention():
            return width * mean_keys(length, attention.sliding_window)
        case LatentAttention():
            return width * mean_keys(length, None)
        case SparseLatentAttention():
            index = attention.index_n_heads * attention.index_head_dim
            return width * mean_keys(length, attention.index_topk) + index * mean_keys(length, None)
        case CompressedAttention(compression=compression):
            seen, index = mean_keys(length, attention.sliding_window), 0.0
            if compression is not None:
                entries = length / compression.compress_ratio
                picked = compression.index_topk if isinstance(compression, SparseCompression) else None
                seen += mean_keys(entries, picked)
                if isinstance(compression, SparseCompression):
                    index = compression.index_n_heads * compression.index_head_dim * mean_keys(entries, None)
            return width * seen + index


def decode_multiplications(attention: Attention, context: int) -> int:
    """Multiplications of one new token's attention to the `context` tokens that end with it."""
    match attention:
        case GroupedQueryAttention():
            window = attention.sliding_window
            return query_key_value_width(attention) * (context if window is None else min(context, window))
        case LatentAttention():
            return absorbed_width(attention) * context
        case SparseLatentAttention():
            index = attention.index_n_heads * attention.index_head_dim * context
            return absorbed_width(attention.latent) * min(context, attention.index_topk) + index
        case CompressedAttention(compression=compression):
            seen, index = min(context, attention.sliding_window), 0
            if compression is not None:
                entries = context // compression.compress_ratio
                if isinstance(compression, SparseCompression):
                    index = compression.index_n_heads * compression.index_head_dim * entries
                    entries = min(entries, compression.index_topk)
                seen += entries
            return query_key_value_width(attention) * seen + index
