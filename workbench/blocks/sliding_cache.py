"""What windowed attention keeps of the past: the last tokens and no more."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.blocks.cache import room_for


class SlidingKeyValueCache:
    """Rotated keys and values of the last `sliding_window` tokens: 2 G K numbers for each of them.

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
        sliding_window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, min(sliding_window, max_length), num_heads, head_dim)
        self.max_length = max_length
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self, key: Float[Tensor, "B T G K"], value: Float[Tensor, "B T G K"]
    ) -> tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]]:
        """Store the keys and values of the next T tokens; returns those kept before, then the new."""
        end = room_for(key, self.key, self.length, self.max_length)
        joined = slide(self.key, key, self.length), slide(self.value, value, self.length)
        self.length = end
        return joined

    def truncate(self, length: int) -> None:
        """Nothing can be forgotten: see `refuse_to_truncate`."""
        refuse_to_truncate(length, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.key.nbytes + self.value.nbytes


def slide(kept: Float[Tensor, "B Y *rest"], new: Float[Tensor, "B T *rest"], length: int) -> Float[Tensor, "B S *rest"]:
    """Append `new` to a window that has seen `length` tokens and drop what leaves it; returns the old and the new.

    Both are in the dtype of `new`, which is rounded like what is kept: chunks of any length give the same.
    """
    size = kept.shape[1]
    joined = torch.cat((kept[:, : min(length, size)], new.to(kept.dtype)), dim=1)
    kept[:, : min(length + new.shape[1], size)] = joined[:, -size:]
    return joined.to(new.dtype)


def refuse_to_truncate(length: int, kept: int) -> None:
    """Raise `ValueError` unless nothing is to be forgotten: what left a window, or was pooled, cannot come back."""
    if length != kept:
        raise ValueError(f"a cache that keeps a window of {kept} tokens cannot go back to {length}")
