"""What a decoder keeps between tokens: one cache per layer, of the kind that its attention needs."""

from __future__ import annotations

import torch

from workbench.blocks.cache import KeyValueCache, LatentCache
from workbench.blocks.compressed_cache import CompressedCache
from workbench.blocks.float8_latent_cache import Float8LatentCache
from workbench.blocks.sliding_cache import SlidingKeyValueCache
from workbench.blocks.sparse_latent_attention import SparseLatentCache
from workbench.blocks.transformer_layer import LayerCache
from workbench.model import config as spec


class DecoderCache:
    """One cache per layer of the main model; `length` tokens are kept so far."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Tokens kept so far."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for layer in self.layers:
            layer.truncate(length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of all layers occupy, measured from the tensors."""
        return sum(layer.nbytes for layer in self.layers)


def build_cache(
    attention: spec.Attention,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerCache:
    """The cache that an attention specification needs."""
    narrow = dtype == torch.float8_e4m3fn
    spec.require(
        not narrow or isinstance(attention, spec.LatentAttention),
        f"dtype=float8_e4m3fn is for LatentAttention; {type(attention).__name__} has no such cache",
    )
    match attention:
        case spec.LatentAttention() if narrow:
            return Float8LatentCache(
                batch_size,
                max_length,
                kv_lora_rank=attention.kv_lora_rank,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                device=device,
            )
        case spec.GroupedQueryAttention(num_key_value_heads=heads, sliding_window=None):
            return KeyValueCache(
                batch_size, max_length, num_heads=heads, head_dim=attention.head_dim, dtype=dtype, device=device
            )
        case spec.GroupedQueryAttention(num_key_value_heads=heads, sliding_window=window):
            assert window is not None
            return SlidingKeyValueCache(
                batch_size,
                max_length,
                num_heads=heads,
                head_dim=attention.head_dim,
                sliding_window=window,
                dtype=dtype,
                device=device,
            )
        case spec.LatentAttention():
            return LatentCache(
                batch_size,
                max_length,
                kv_lora_rank=attention.kv_lora_rank,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                dtype=dtype,
                device=device,
            )
        case spec.SparseLatentAttention(latent=latent):
            return SparseLatentCache(
                batch_size,
                max_length,
                kv_lora_rank=latent.kv_lora_rank,
                qk_rope_head_dim=latent.qk_rope_head_dim,
                index_head_dim=attention.index_head_dim,
                dtype=dtype,
                device=device,
            )
        case spec.CompressedAttention():
            compression = attention.compression
            return CompressedCache(
                batch_size,
                max_length,
                head_dim=attention.head_dim,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                sliding_window=attention.sliding_window,
                compress_ratio=None if compression is None else compression.compress_ratio,
                index_head_dim=compression.index_head_dim if isinstance(compression, spec.SparseCompression) else None,
                dtype=dtype,
                device=device,
            )
