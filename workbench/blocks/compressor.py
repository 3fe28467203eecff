"""Compression along the sequence: a few tokens become one entry, a sum weighed by learned gates.

Every number of an entry has a softmax of its own over the tokens of its window. Z is the number of tokens in a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.blocks.compressed_cache import PoolCache
from workbench.blocks.keep_wide import KeepWide
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench.blocks.trailing_rope import rotate_trailing


class Entries(NamedTuple):
    """All entries so far, which of them each of T queries reads, and the scores that decided (None: all are read).

    Scores are there for every entry, those of windows that a query has not seen closed included.
    """

    key: Float[Tensor, "B S K"]
    read: Bool[Tensor, "B T S"]
    scores: Float[Tensor, "B T S"] | None


class Pool(KeepWide):
    """Abstract: the pooling of tokens into entries, for compressors and the indexer.

    Entry i covers the `compress_ratio` tokens from i * compress_ratio on, and its last numbers turn as the first of
    these tokens does. With `overlaps` every token offers two values: the second half of the projection goes into the
    entry of its own window, the first half into the next one, which so covers twice as many tokens. Softmax in float32
    or wider.

    Raises:
        ValueError: `compress_ratio` is below 1.

    Source: DeepSeek-V4, arXiv 2606.19348, sections 2.3.1 (with overlap) and 2.3.2 (without).
    """

    keep_wide = ("position_bias",)

    def __init__(self, hidden_size: int, head_dim: int, *, compress_ratio: int, overlaps: bool, eps: float) -> None:
        super().__init__()
        if compress_ratio < 1:
            raise ValueError(f"compress_ratio={compress_ratio} must be at least 1")
        pooled_width = 2 * head_dim if overlaps else head_dim
        self.compress_ratio = compress_ratio
        self.overlaps = overlaps
        self.kv_proj = nn.Linear(hidden_size, pooled_width, bias=False)
        self.gate_proj = nn.Linear(hidden_size, pooled_width, bias=False)
        self.position_bias = nn.Parameter(torch.empty(compress_ratio, pooled_width))
        self.kv_norm = RMSNorm(head_dim, eps=eps)

    def pool(self, x: Float[Tensor, "B T D"], turn: Rotation, cache: PoolCache | None) -> Float[Tensor, "B S K"]:
        """All entries whose window has closed by the last of the T tokens."""
        new = (self.kv_proj(x), self.gate_proj(x))
        if cache is None:
            (value_BSX, gate_BSX), starts = new, Rotation(*(part[:: self.compress_ratio] for part in turn))
        else:
            value_BSX, gate_BSX, starts = cache.resume(*new, turn)
        num_windows = value_BSX.shape[1] // self.compress_ratio
        num_closed = num_windows * self.compress_ratio
        windows = (num_windows, self.compress_ratio)
        value_BSZX = value_BSX[:, :num_closed].unflatten(1, windows)
        gate_BSZX = gate_BSX[:, :num_closed].unflatten(1, windows)
        if cache is not None:
            open_turn = Rotation(*(part[num_windows:] for part in starts))
            cache.keep_remainder(value_BSX[:, num_closed:], gate_BSX[:, num_closed:], open_turn)
        if self.overlaps:
            pooled_BSK = gated_sum(*overlapped(value_BSZX, gate_BSZX, self.position_bias, cache))
        else:
            pooled_BSK = gated_sum(value_BSZX, gate_BSZX, self.position_bias)
        closed_turn = Rotation(*(part[:num_windows] for part in starts))
        entries_BSK = rotate_trailing(self.kv_norm(pooled_BSK).unsqueeze(2), closed_turn).squeeze(2)
        return entries_BSK if cache is None else cache.append(entries_BSK, x.shape[1])


class HeavyCompressor(Pool):
    """One entry for each window of tokens; a query reads every entry whose window has closed.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.2.
    """

    def __init__(self, hidden_size: int, head_dim: int, *, compress_ratio: int, eps: float) -> None:
        super().__init__(hidden_size, head_dim, compress_ratio=compress_ratio, overlaps=False, eps=eps)

    def forward(self, x: Float[Tensor, "B T D"], turn: Rotation, cache: PoolCache | None = None) -> Entries:
        first = 0 if cache is None else cache.length
        key_BSK = self.pool(x, turn, cache)
        closed_TS = closed(first, x.shape[1], key_BSK.shape[1], self.compress_ratio, x.device)
        return Entries(key_BSK, closed_TS.expand(x.shape[0], -1, -1), None)


def gated_sum(
    value: Float[Tensor, "B S Z K"], gate: Float[Tensor, "B S Z K"], position_bias: Float[Tensor, "Z K"]
) -> Float[Tensor, "B S K"]:
    """The sum over Z tokens, weighed by the softmax over them of gate + position_bias, number by number."""
    biased_BSZK = gate + position_bias
    weights_BSZK = biased_BSZK.softmax(2, dtype=torch.promote_types(biased_BSZK.dtype, torch.float32))
    return (value * weights_BSZK.to(value.dtype)).sum(2)


def overlapped(
    value: Float[Tensor, "B S Z X"],
    gate: Float[Tensor, "B S Z X"],
    position_bias: Float[Tensor, "Z X"],
    cache: PoolCache | None,
) -> tuple[Float[Tensor, "B S 2*Z K"], Float[Tensor, "B S 2*Z K"], Float[Tensor, "2*Z K"]]:
    """Per window the first series (half of X) of the window before, then the second series of its own.

    Before the first window there is nothing: value 0 with gate minus infinity. `cache` hands over the window before the
    first of these and keeps the last.
    """
    first_value_BSZK, second_value_BSZK = value.chunk(2, dim=-1)
    first_gate_BSZK, second_gate_BSZK = gate.chunk(2, dim=-1)
    if cache is None:
        nothing_BSZK = value.new_zeros(value.shape[0], 1, value.shape[2], value.shape[3] // 2)
        before = (nothing_BSZK, torch.full_like(nothing_BSZK, -torch.inf))
    else:
        before = (cache.previous_value.to(value.dtype).unsqueeze(1), cache.previous_gate.to(gate.dtype).unsqueeze(1))
    first_value_BSZK = torch.cat((before[0], first_value_BSZK), dim=1)
    first_gate_BSZK = torch.cat((before[1], first_gate_BSZK), dim=1)
    if cache is not None:
        cache.keep_previous(first_value_BSZK[:, -1], first_gate_BSZK[:, -1])
    return (
        torch.cat((first_value_BSZK[:, :-1], second_value_BSZK), dim=2),
        torch.cat((first_gate_BSZK[:, :-1], second_gate_BSZK), dim=2),
        torch.cat(position_bias.chunk(2, dim=-1)),
    )


def closed(
    first: int, num_queries: int, num_entries: int, compress_ratio: int, device: torch.device
) -> Bool[Tensor, "T S"]:
    """True where the window of an entry has closed: its last token is the query's or an earlier one.

    The queries stand at the positions from `first` on. An entry of a window still open would carry the future.
    """
    num_closed_T = (torch.arange(first, first + num_queries, device=device) + 1) // compress_ratio
    return torch.arange(num_entries, device=device) < num_closed_T.unsqueeze(-1)
