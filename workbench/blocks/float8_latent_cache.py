"""The latent cache in DeepSeek's narrow layout: FP8 latents with a scale for every 128 numbers, positions in BF16."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.blocks.cache import kept_of, room_for
from workbench_kernels import Float8Cache
from workbench_kernels.quantize_blockwise import FP8, WIDTH, dequantize, quantize_blockwise


class Float8LatentCache:
    """C numbers of one byte, a float32 scale for every 128 of them, and R numbers of two bytes per token.

    A block's scale takes its largest number to the largest of FP8 (448). A number is off by at most a sixteenth of
    itself, or by 2^-10 scales where it is so small that FP8 has no normal form for it. What is handed back has the
    dtype that is asked for.

    Raises:
        ValueError: more tokens are appended than `max_length`.

    Source: FlashMLA's layout of 656 bytes a token; DeepSeek-V3, arXiv 2412.19437, section 3.3 (scales of blocks).
    """

    def __init__(
        self, batch_size: int, max_length: int, *, kv_lora_rank: int, qk_rope_head_dim: int, device: torch.device
    ) -> None:
        shape, blocks = (batch_size, max_length), -(-kv_lora_rank // WIDTH)
        self.latent = torch.zeros(*shape, kv_lora_rank, dtype=FP8, device=device)
        self.scale = torch.zeros(*shape, blocks, dtype=torch.float32, device=device)
        self.key_rope = torch.zeros(*shape, qk_rope_head_dim, dtype=torch.bfloat16, device=device)
        self.length = 0

    def append(self, latent: Float[Tensor, "B T C"], key_rope: Float[Tensor, "B T R"]) -> None:
        """Store latent and shared key of the next T tokens, rounded."""
        end = room_for(latent, self.latent, self.length)
        self.latent[:, self.length : end], self.scale[:, self.length : end] = quantize_blockwise(latent)
        self.key_rope[:, self.length : end] = key_rope
        self.length = end

    def packed(self, dtype: torch.dtype) -> Float8Cache:
        """All tokens so far as `mla_decode` reads them, in whatever `dtype` it computes."""
        return Float8Cache(*(part[:, : self.length] for part in (self.latent, self.scale, self.key_rope)))

    def parts(self, dtype: torch.dtype) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S R"]]:
        """Latent and shared key of all tokens so far, each by itself."""
        latent, scale, key_rope = self.packed(dtype)
        return dequantize(latent, scale).to(dtype), key_rope.to(dtype)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = kept_of(length, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.latent.nbytes + self.scale.nbytes + self.key_rope.nbytes
