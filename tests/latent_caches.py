"""Queries and latent caches in every layout, with NaN wherever a decoding op may not look; and the rule for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from kernel_rules import assert_exact, uninitialized_memory_is_nan, widened
from torch import Tensor

from workbench_kernels.mla_decode import Float8Cache, MlaDecoded, reference

Decode = Callable[..., MlaDecoded]
SCALE = 0.2


class Decoding(NamedTuple):
    """The arguments of one call."""

    q_nope: Tensor
    q_rope: Tensor
    kv_cache: Tensor | Float8Cache
    block_table: Tensor | None
    cache_seqlens: Tensor

    def by(self, op: Decode) -> MlaDecoded:
        return op(*self[:3], block_table=self.block_table, cache_seqlens=self.cache_seqlens, softmax_scale=SCALE)

    def widened(self) -> Decoding:
        cache = self.kv_cache if isinstance(self.kv_cache, Float8Cache) else widened(self.kv_cache)
        return self._replace(q_nope=widened(self.q_nope), q_rope=widened(self.q_rope), kv_cache=cache)


def decoding(
    lengths: Sequence[int],
    queries: int,
    heads: int,
    latent: int,
    rope: int,
    *,
    page_size: int | None = None,
    float8: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Decoding:
    """Pages lie in no order, between pages that nobody lists; a table's unused entries point far outside."""
    torch.manual_seed(0)
    q_nope, q_rope = (torch.randn(len(lengths), queries, heads, width).to(device, dtype) for width in (latent, rope))
    size = page_size or max(lengths, default=0) + 3
    counts = [-(-length // size) for length in lengths] if page_size else [1] * len(lengths)
    table = torch.full((len(lengths), max(counts, default=0) + 1), 10**6, dtype=torch.int32)
    free = iter((torch.randperm(sum(counts) + 2) if page_size else torch.arange(len(lengths))).tolist())
    kv_cache = torch.full((sum(counts) + 2 if page_size else len(lengths), size, latent + rope), torch.nan)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for page in range(count):
            table[b, page] = next(free)
            kept = min(size, length - page * size)
            kv_cache[table[b, page], :kept] = torch.randn(kept, latent + rope)
    block_table = table.to(device) if page_size else None
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if float8:
        scale = 0.2 + torch.rand(*kv_cache.shape[:2], -(-latent // 128)) + 0 * kv_cache[..., :1]
        narrow = kv_cache[..., :latent].to(torch.float8_e4m3fn)
        cache = Float8Cache(narrow.to(device), scale.to(device), kv_cache[..., latent:].to(device, torch.bfloat16))
        return Decoding(q_nope, q_rope, cache, block_table, cache_seqlens)
    return Decoding(q_nope, q_rope, kv_cache.to(device, dtype), block_table, cache_seqlens)


def assert_decodes(op: Decode, arguments: Decoding) -> None:
    """The rule of `kernel_rules` for both outputs: as exact as the reference allows, the same bits in every run."""
    with torch.inference_mode():
        found = arguments.by(op)
    with uninitialized_memory_is_nan():
        again = arguments.by(op)
    own, truth = arguments.by(reference), arguments.widened().by(reference)
    for name, ours, second, theirs, exact in zip(found._fields, found, again, own, truth, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(ours, second), f"{name} differs between two runs"
        seen = exact > -torch.inf
        assert torch.equal(ours > -torch.inf, seen), name
        assert_exact(name, ours[seen], theirs[seen], exact[seen])
