"""What a model would keep of the past with each kind of attention, predicted by arithmetic on its configuration.

`workbench.analysis.probe` measures the same from tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd

from workbench.model.config import (
    Attention,
    CompressedAttention,
    GroupedQueryAttention,
    LatentAttention,
    ModelConfig,
    SparseLatentAttention,
)
from workbench.model.count import Precision, cache_bytes, cache_elements_per_token

KINDS = ("MHA", "GQA", "MQA", "MLA")
COLUMNS = ("kind", "precision", "batch_size", "context", "elements_per_token", "bytes_per_token", "bytes", "provenance")


def variants(
    config: ModelConfig,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
) -> dict[str, ModelConfig]:
    """The same model with the attention of all its layers replaced by MHA, GQA, MQA and MLA, by these names.

    What is not given is taken from the layer's own attention. Where that has no such thing: the head width of a latent
    attention is its `v_head_dim`; GQA's `num_key_value_heads` is the divisor of the heads nearest to their square root;
    the latent is 4 heads wide and the rotary key half a head (DeepSeek-V2's choice), queries uncompressed.

    Raises:
        ValueError: sizes that do not go together.

    Source: DeepSeek-V2, arXiv 2405.04434, table 1 and section 2.1.
    """
    built: dict[str, ModelConfig] = {}
    for kind in KINDS:
        layers = []
        for layer in config.layers:
            attention = variant(
                layer.attention,
                kind,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                kv_lora_rank=kv_lora_rank,
                qk_rope_head_dim=qk_rope_head_dim,
            )
            layers.append(replace(layer, attention=attention))
        built[kind] = replace(config, layers=tuple(layers))
    return built


def variant(
    attention: Attention,
    kind: str,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
) -> GroupedQueryAttention | LatentAttention:
    """One attention replaced by its `kind` (see `variants`); a sparse latent attention counts as its latent one.

    Raises:
        ValueError: sizes that do not go together, or a compressed attention, which has no such twin.
    """
    if isinstance(attention, CompressedAttention):
        raise ValueError("CompressedAttention keeps windows and entries; it cannot be compared kind by kind")
    if isinstance(attention, SparseLatentAttention):
        attention = attention.latent
    heads = attention.num_attention_heads if num_attention_heads is None else num_attention_heads
    if heads < 1:
        raise ValueError(f"num_attention_heads={heads} must be at least 1")
    if kind == "MLA":
        latent = attention if isinstance(attention, LatentAttention) else as_latent(attention)
        return replace(
            latent,
            num_attention_heads=heads,
            kv_lora_rank=latent.kv_lora_rank if kv_lora_rank is None else kv_lora_rank,
            qk_rope_head_dim=latent.qk_rope_head_dim if qk_rope_head_dim is None else qk_rope_head_dim,
        )
    head_dim = attention.v_head_dim if isinstance(attention, LatentAttention) else attention.head_dim
    groups = own_groups(attention, heads) if num_key_value_heads is None else num_key_value_heads
    shared = {"MHA": heads, "GQA": groups, "MQA": 1}
    return GroupedQueryAttention(
        num_attention_heads=heads, num_key_value_heads=shared[kind], head_dim=head_dim, rope=attention.rope
    )


def as_latent(attention: GroupedQueryAttention) -> LatentAttention:
    """The latent attention with the same heads, in DeepSeek-V2's proportions."""
    return LatentAttention(
        num_attention_heads=attention.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=4 * attention.head_dim,
        qk_nope_head_dim=attention.head_dim,
        # Half a head, and even since RoPE turns pairs.
        qk_rope_head_dim=2 * -(-attention.head_dim // 4),
        v_head_dim=attention.head_dim,
        rope=attention.rope,
    )


def own_groups(attention: GroupedQueryAttention | LatentAttention, heads: int) -> int:
    """The key/value heads of an attention that shares them, otherwise the divisor of `heads` nearest to its root."""
    divisors = [g for g in range(1, heads + 1) if heads % g == 0]
    if isinstance(attention, GroupedQueryAttention) and attention.num_key_value_heads in divisors[1:-1]:
        return attention.num_key_value_heads
    return min(divisors, key=lambda g: abs(g - heads**0.5))


def bytes_per_token(config: ModelConfig, precision: Precision = "bfloat16") -> dict[str, int]:
    """Predicted cache bytes of one token over all layers, by kind of attention."""
    return {kind: cache_bytes(variant_config, 1, precision) for kind, variant_config in variants(config).items()}


def cache_table(
    config: ModelConfig,
    contexts: Iterable[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    precisions: Sequence[Precision] = ("bfloat16",),
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
) -> pd.DataFrame:
    """Cache of the same model by kind of attention, precision, batch size and context length, one row each.

    `elements_per_token` and `bytes_per_token` are those of one token in all layers; `bytes` is the whole cache of
    `batch_size` sequences of `context` tokens. `provenance` is `predicted` throughout: a storage formula, elements
    times the width of the type; `float8` has scales beside it and a latent's positional part in BF16 (see
    `workbench.model.count.cache_bytes`).

    Raises:
        ValueError: sizes that do not go together, an unknown precision, or a batch size or context below 1.
    """
    contexts = list(contexts)
    for name, sizes in (("context", contexts), ("batch_size", batch_sizes)):
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name}={min(sizes)} must be at least 1")
    models = variants(
        config,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
    )
    rows = []
    for kind, model in models.items():
        elements = sum(cache_elements_per_token(layer.attention) for layer in model.layers)
        for precision in precisions:
            token_bytes = cache_bytes(model, 1, precision)
            for batch_size in batch_sizes:
                for context in contexts:
                    whole = batch_size * cache_bytes(model, context, precision)
                    rows.append((kind, precision, batch_size, context, elements, token_bytes, whole, "predicted"))
    return pd.DataFrame(rows, columns=list(COLUMNS))
