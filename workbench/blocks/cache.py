"""What a decoder keeps of the past, per layer: tensors allocated once, filled from the left.

A cache may be narrower than the model: it rounds what it keeps, and hands it back in the dtype of what came in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class KeyValueCache:
    """Rotated keys and values of every key/value head: 2 G K numbers per token.

    Raises:
        ValueError: more tokens are appended than `max_length`.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, max_length, num_heads, head_dim)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self, key: Float[Tensor, "B T G K"], value: Float[Tensor, "B T G K"]
    ) -> tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]]:
        """Store the keys and values of the next T tokens; returns those of all tokens so far."""
        end = room_for(key, self.key, self.length)
        self.key[:, self.length : end] = key
        self.value[:, self.length : end] = value
        self.length = end
        return self.key[:, :end].to(key.dtype), self.value[:, :end].to(value.dtype)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = kept_of(length, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.key.nbytes + self.value.nbytes


class LatentCache:
    """The normed latent and the rotated key shared by all heads, side by side: C + R numbers per token.

    Raises:
        ValueError: more tokens are appended than `max_length`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.3.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.widths = (kv_lora_rank, qk_rope_head_dim)
        self.kept = torch.zeros(batch_size, max_length, sum(self.widths), dtype=dtype, device=device)
        self.length = 0

    def append(self, latent: Float[Tensor, "B T C"], key_rope: Float[Tensor, "B T R"]) -> None:
        """Store latent and shared key of the next T tokens."""
        end = room_for(latent, self.kept, self.length)
        self.kept[:, self.length : end] = torch.cat((latent, key_rope), dim=-1)
        self.length = end

    def packed(self, dtype: torch.dtype) -> Float[Tensor, "B S width"]:
        """Latent and shared key of all tokens so far, as `mla_decode` reads them."""
        return self.kept[:, : self.length].to(dtype)

    def parts(self, dtype: torch.dtype) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S R"]]:
        """Latent and shared key of all tokens so far, each by itself."""
        latent_BSC, key_rope_BSR = self.packed(dtype).split(self.widths, dim=-1)
        return latent_BSC, key_rope_BSR

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = kept_of(length, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.kept.nbytes


def kept_of(length: int, kept: int) -> int:
    """`length`, unless more than the `kept` tokens should be kept."""
    if not 0 <= length <= kept:
        raise ValueError(f"length={length} must lie in 0..{kept} (tokens kept)")
    return length


def room_for(new: Tensor, kept: Tensor, length: int, max_length: int | None = None) -> int:
    """The length after appending `new` along axis 1; `max_length=None` is the size of `kept`."""
    end = length + new.shape[1]
    most = kept.shape[1] if max_length is None else max_length
    if end > most:
        raise ValueError(f"the cache holds max_length={most} tokens; {length} are kept and {new.shape[1]} more came")
    if new.shape[0] != kept.shape[0]:
        raise ValueError(f"the cache was made for batch_size={kept.shape[0]}, not {new.shape[0]}")
    return end
