"""What compressed attention keeps of the past: a window of tokens, and one entry for every few tokens before.

Besides the entries there is the remainder, tokens whose window has not closed, and with overlap the last closed window:
its tokens are pooled a second time. Z is the number of tokens in a pooling window.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.blocks.cache import room_for
from workbench.blocks.rope import Rotation
from workbench.blocks.sliding_cache import refuse_to_truncate, slide


class PoolCache:
    """Entries pooled so far, and what pooling needs to go on after any number of tokens.

    `length` counts tokens; the first length // compress_ratio entries exist, the remainder holds the last
    length % compress_ratio tokens. An entry stands where its window begins, hence `start`, the rotation of the
    remainder's first token. With `overlaps` two series are pooled and `previous` holds the first one's last window; as
    long as there is none its gates are minus infinity, which weigh nothing.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        head_dim: int,
        qk_rope_head_dim: int,
        compress_ratio: int,
        overlaps: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        pooled_width = 2 * head_dim if overlaps else head_dim
        previous_shape = (batch_size, compress_ratio if overlaps else 0, head_dim)
        self.compress_ratio = compress_ratio
        self.entries = zeros(batch_size, max_length // compress_ratio, head_dim)
        self.value = zeros(batch_size, compress_ratio - 1, pooled_width)
        self.gate = zeros(batch_size, compress_ratio - 1, pooled_width)
        self.start = zeros(2, 1, qk_rope_head_dim // 2)
        self.previous_value = zeros(*previous_shape)
        self.previous_gate = zeros(*previous_shape).fill_(-torch.inf)
        self.length = 0

    def resume(
        self, value: Float[Tensor, "B T X"], gate: Float[Tensor, "B T X"], turn: Rotation
    ) -> tuple[Float[Tensor, "B S X"], Float[Tensor, "B S X"], Rotation]:
        """The remainder followed by the next T tokens, and the rotation at the first token of every window in them."""
        count = self.length % self.compress_ratio
        starts = Rotation(
            *(
                _joined(kept[: min(count, 1)], new[-count % self.compress_ratio :: self.compress_ratio], 0)
                for kept, new in zip(self.start, turn, strict=True)
            )
        )
        return _joined(self.value[:, :count], value, 1), _joined(self.gate[:, :count], gate, 1), starts

    def keep_remainder(self, value: Float[Tensor, "B T X"], gate: Float[Tensor, "B T X"], starts: Rotation) -> None:
        """Store the tokens whose window has not closed, and its start."""
        count = value.shape[1]
        self.value[:, :count] = value
        self.gate[:, :count] = gate
        for kept, start in zip(self.start, starts, strict=True):
            kept[: start.shape[0]] = start

    def keep_previous(self, value: Float[Tensor, "B Z K"], gate: Float[Tensor, "B Z K"]) -> None:
        """Store the first series of the last closed window."""
        self.previous_value[:] = value
        self.previous_gate[:] = gate

    def append(self, entries: Float[Tensor, "B T K"], num_tokens: int) -> Float[Tensor, "B S K"]:
        """Store the entries that the next `num_tokens` tokens close; returns all entries so far."""
        first = self.length // self.compress_ratio
        end = first + entries.shape[1]
        self.entries[:, first:end] = entries
        self.length += num_tokens
        return self.entries[:, :end].to(entries.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        kept = (self.entries, self.value, self.gate, self.start, self.previous_value, self.previous_gate)
        return sum(tensor.nbytes for tensor in kept)


class CompressedCache:
    """The keys of the last `sliding_window` tokens, and the pools of one compressed attention.

    `compress_ratio=None` is the window alone, `index_head_dim=None` heavy compression: entries without index keys and
    without overlap.

    Raises:
        ValueError: more tokens are appended than `max_length`, or there are index keys without compression.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        head_dim: int,
        qk_rope_head_dim: int,
        sliding_window: int,
        compress_ratio: int | None,
        index_head_dim: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def pool(width: int) -> PoolCache:
            if compress_ratio is None:
                raise ValueError(f"index_head_dim={index_head_dim} needs a compress_ratio, not None")
            return PoolCache(
                batch_size,
                max_length,
                head_dim=width,
                qk_rope_head_dim=qk_rope_head_dim,
                compress_ratio=compress_ratio,
                overlaps=index_head_dim is not None,
                dtype=dtype,
                device=device,
            )

        self.max_length = max_length
        self.key = torch.zeros(batch_size, min(sliding_window, max_length), head_dim, dtype=dtype, device=device)
        self.compressor = pool(head_dim) if compress_ratio is not None else None
        self.indexer = pool(index_head_dim) if index_head_dim is not None else None
        self.length = 0

    def append(self, key: Float[Tensor, "B T K"]) -> Float[Tensor, "B S K"]:
        """Keep the keys of the next T tokens, drop what leaves the window; returns the kept ones, then the new."""
        end = room_for(key, self.key, self.length, self.max_length)
        joined_BSK = slide(self.key, key, self.length)
        self.length = end
        return joined_BSK

    def truncate(self, length: int) -> None:
        """Nothing can be forgotten: see `refuse_to_truncate`."""
        refuse_to_truncate(length, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.key.nbytes + sum(pool.nbytes for pool in (self.compressor, self.indexer) if pool is not None)


def _joined(kept: Tensor, new: Tensor, axis: int) -> Tensor:
    """Both along `axis`, in the dtype of `new`, which is rounded like `kept`: chunks of any length give the same."""
    return torch.cat((kept, new.to(kept.dtype)), dim=axis).to(new.dtype)
