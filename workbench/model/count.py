"""Parameters, cache bytes and floating-point operations as arithmetic on a configuration; no tensor is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.model.config import (
    Attention,
    DenseFeedForward,
    FeedForward,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    require,
)

Precision = Literal["float32", "bfloat16", "float16", "float8"]
BYTES_PER_ELEMENT: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters (selection biases are buffers and not counted).

    `total` and the three `active` figures are those of the main model; publishers differ in which of the three they
    print. `mtp` is what the further prediction depths add, without the embedding and head that they share.
    """

    total: int
    active: int
    active_without_embedding: int
    active_without_embedding_and_head: int
    mtp: int


def parameters(config: ModelConfig) -> ParameterCount:
    """How many parameters a model of this configuration holds, and how many a token meets."""
    width = config.hidden_size
    embedding = config.vocab_size * width
    head = 0 if config.tie_word_embeddings else embedding
    total_layers = sum(layer_parameters(layer, width) for layer in config.layers)
    active_layers = sum(layer_parameters(layer, width, active=True) for layer in config.layers)
    bare = active_layers + width
    entrance_and_exit = 2 * width * width + 3 * width
    mtp = sum(layer_parameters(layer, width) + entrance_and_exit for layer in config.mtp_layers)
    return ParameterCount(
        total=total_layers + width + embedding + head,
        active=bare + embedding + head,
        active_without_embedding=bare + embedding if config.tie_word_embeddings else bare + head,
        active_without_embedding_and_head=bare,
        mtp=mtp,
    )


def layer_parameters(layer: LayerConfig, hidden_size: int, *, active: bool = False) -> int:
    """Parameters of one layer with its two norms; `active` counts only the experts that a token visits."""
    return (
        attention_parameters(layer.attention, hidden_size)
        + feed_forward_parameters(layer.feed_forward, hidden_size, active=active)
        + 2 * hidden_size
    )


def attention_parameters(attention: Attention, hidden_size: int) -> int:
    """Parameters of one attention block."""
    match attention:
        case GroupedQueryAttention():
            heads = 2 * attention.num_attention_heads + 2 * attention.num_key_value_heads
            return hidden_size * heads * attention.head_dim
        case LatentAttention():
            heads, rank = attention.num_attention_heads, attention.kv_lora_rank
            query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
            if attention.q_lora_rank is None:
                query = hidden_size * query_width
            else:
                query = attention.q_lora_rank * (hidden_size + 1 + query_width)
            down = hidden_size * (rank + attention.qk_rope_head_dim) + rank
            up = rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
            return query + down + up + heads * attention.v_head_dim * hidden_size


def feed_forward_parameters(feed_forward: FeedForward, hidden_size: int, *, active: bool = False) -> int:
    """Parameters of one feed-forward block; `active` counts only the experts that a token visits."""
    match feed_forward:
        case DenseFeedForward():
            return 3 * hidden_size * feed_forward.intermediate_size
        case MixtureOfExperts():
            routed = feed_forward.num_experts_per_tok if active else feed_forward.n_routed_experts
            experts = (routed + feed_forward.n_shared_experts) * 3 * hidden_size * feed_forward.moe_intermediate_size
            return experts + feed_forward.n_routed_experts * hidden_size


def cache_elements_per_token(attention: Attention) -> int:
    """Numbers that one layer keeps of one token."""
    match attention:
        case GroupedQueryAttention():
            return 2 * attention.num_key_value_heads * attention.head_dim
        case LatentAttention():
            return attention.kv_lora_rank + attention.qk_rope_head_dim


def cache_bytes(config: ModelConfig, context: int, precision: Precision = "bfloat16") -> int:
    """Bytes that the cache of one sequence of `context` tokens takes in the main model's layers.

    Raises:
        ValueError: `context` is negative or `precision` unknown.
    """
    require(context >= 0, f"context={context} must be 0 or more")
    known = ", ".join(BYTES_PER_ELEMENT)
    require(precision in BYTES_PER_ELEMENT, f"precision={precision!r} must be one of {known}")
    elements = sum(cache_elements_per_token(layer.attention) for layer in config.layers)
    return elements * context * BYTES_PER_ELEMENT[precision]


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward of the main model: 6 per active parameter (without the input embedding), plus attention.

    A causal query meets half the context on average, so attention costs 3 x context x heads x (key + value width).

    Source: checked against the published figures of DeepSeek-V2 and V3, arXiv 2505.09343, table 2.
    """
    require(context >= 1, f"context={context} must be 1 or more")
    attention = sum(context * query_key_value_width(layer.attention) for layer in config.layers)
    return 6.0 * parameters(config).active_without_embedding + 3.0 * attention


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward of one new token among `context` that it sees, itself included: 2 per active parameter, plus attention.

    Latent attention is counted in its absorbed form, in which each head reads the cached latent itself.
    """
    require(context >= 0, f"context={context} must be 0 or more")
    attention = 0
    for layer in config.layers:
        match layer.attention:
            case GroupedQueryAttention() as a:
                attention += 2 * context * query_key_value_width(a)
            case LatentAttention() as a:
                attention += 2 * context * a.num_attention_heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim)
    return 2.0 * parameters(config).active_without_embedding + attention


def query_key_value_width(attention: Attention) -> int:
    """Multiplications per query and visible key, over all heads: key width for the score, value width for the mix."""
    match attention:
        case GroupedQueryAttention():
            return attention.num_attention_heads * 2 * attention.head_dim
        case LatentAttention():
            per_head = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
            return attention.num_attention_heads * per_head
