"""How many parameters a configuration has, as arithmetic on it; no tensor is made."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.model.config import (
    Attention,
    CompressedAttention,
    DenseFeedForward,
    FeedForward,
    GroupedQueryAttention,
    HeavyCompression,
    HyperConnections,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    SparseCompression,
    SparseLatentAttention,
)


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters (selection biases and V4's tables of experts by token are buffers and not counted).

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
    outside = width + hyper_connection_parameters(config.hyper_connections, width, len(config.layers))
    bare = active_layers + outside
    entrance_and_exit = 2 * width * width + 3 * width
    mtp = sum(layer_parameters(layer, width) + entrance_and_exit for layer in config.mtp_layers)
    return ParameterCount(
        total=total_layers + outside + embedding + head,
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


def hyper_connection_parameters(streams: HyperConnections | None, hidden_size: int, num_layers: int) -> int:
    """Parameters that mix the residual streams: around both blocks of every layer, and before the last norm."""
    if streams is None:
        return 0
    # What is read from each stream, what each receives, and from which to which the rest goes.
    n, mixes = streams.hc_mult, streams.hc_mult * (2 + streams.hc_mult)
    block = mixes * n * hidden_size + mixes + 3
    head = n * n * hidden_size + n + 1
    return 2 * num_layers * block + head


def attention_parameters(attention: Attention, hidden_size: int) -> int:
    """Parameters of one attention block."""
    match attention:
        case GroupedQueryAttention():
            return grouped_parameters(attention, hidden_size)
        case LatentAttention():
            return latent_parameters(attention, hidden_size)
        case SparseLatentAttention(latent=latent):
            # Queries from the compressed query, one key with a LayerNorm (gain and bias), a weight for every head.
            width, heads = attention.index_head_dim, attention.index_n_heads
            indexer = (latent.q_lora_rank or 0) * heads * width + hidden_size * (width + heads) + 2 * width
            return latent_parameters(latent, hidden_size) + indexer
        case CompressedAttention():
            return compressed_parameters(attention, hidden_size)


def grouped_parameters(attention: GroupedQueryAttention, hidden_size: int) -> int:
    """Parameters of grouped-query attention."""
    query_width = attention.num_attention_heads * attention.head_dim
    key_width = attention.num_key_value_heads * attention.head_dim
    count = hidden_size * (2 * query_width + 2 * key_width)
    count += (query_width + 2 * key_width) * attention.qkv_bias + hidden_size * attention.o_bias
    count += attention.num_attention_heads * attention.sinks
    if attention.qk_norm == "head":
        count += 2 * attention.head_dim
    if attention.qk_norm == "full":
        count += query_width + key_width
    return count


def latent_parameters(attention: LatentAttention, hidden_size: int) -> int:
    """Parameters of multi-head latent attention."""
    heads, rank = attention.num_attention_heads, attention.kv_lora_rank
    query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    if attention.q_lora_rank is None:
        query = hidden_size * query_width
    else:
        query = attention.q_lora_rank * (hidden_size + 1 + query_width)
    down = hidden_size * (rank + attention.qk_rope_head_dim) + rank
    up = rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return query + down + up + heads * attention.v_head_dim * hidden_size


def compressed_parameters(attention: CompressedAttention, hidden_size: int) -> int:
    """Parameters of V4's attention: its queries and shared head, output in groups, sinks, and what compresses."""
    width, rank = attention.head_dim, attention.q_lora_rank
    query_width = attention.num_attention_heads * width
    count = rank * (hidden_size + 1 + query_width) + hidden_size * width + width
    count += query_width * attention.o_lora_rank + attention.o_groups * attention.o_lora_rank * hidden_size
    count += attention.num_attention_heads
    match attention.compression:
        case None:
            return count
        case HeavyCompression(compress_ratio=ratio):
            return count + pooling_parameters(hidden_size, width, ratio, series=1)
        case SparseCompression(compress_ratio=ratio) as c:
            entries = pooling_parameters(hidden_size, width, ratio, series=2)
            index_keys = pooling_parameters(hidden_size, c.index_head_dim, ratio, series=2)
            index_queries = c.index_n_heads * (rank * c.index_head_dim + hidden_size)
            return count + entries + index_keys + index_queries


def pooling_parameters(hidden_size: int, width: int, compress_ratio: int, *, series: int) -> int:
    """Parameters that pool tokens to entries: values and gates of every series, a bias by position, one norm."""
    return 2 * hidden_size * series * width + compress_ratio * series * width + width


def feed_forward_parameters(feed_forward: FeedForward, hidden_size: int, *, active: bool = False) -> int:
    """Parameters of one feed-forward block; `active` counts only the experts that a token visits.

    Shared experts have no biases: no published model has both.
    """
    match feed_forward:
        case DenseFeedForward():
            return 3 * hidden_size * feed_forward.intermediate_size
        case MixtureOfExperts():
            routed = feed_forward.num_experts_per_tok if active else feed_forward.n_routed_experts
            inner = feed_forward.moe_intermediate_size
            experts = (routed + feed_forward.n_shared_experts) * 3 * hidden_size * inner
            biases = routed * (2 * inner + hidden_size) if feed_forward.expert_bias else 0
            router = feed_forward.n_routed_experts * (hidden_size + feed_forward.router_bias)
            return experts + biases + router
