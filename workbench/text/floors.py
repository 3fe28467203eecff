"""What counting alone achieves on the tokens that a model is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.text.batches import Batch
from workbench.text.stream import Stream

# Pairs are counted in chunks, so that memory stays bounded whatever the length of a corpus.
_CHUNK_TOKENS = 2**24
_SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Floors:
    """Losses and accuracies of counting models over one set of target tokens.

    The losses have the keys `uniform` (every token alike), `unigram` (frequency) and `bigram` (frequency after the
    token before). `distance_accuracy[d]` tells how often the likeliest token at distance d after a token is right.
    """

    nats_per_token: dict[str, float]
    nats_per_byte: dict[str, float]
    distance_accuracy: dict[int, float]


class PairCounts:
    """How often token b comes `distance` positions after token a, as a sparse table sorted by a, then b.

    Counts of several streams are weighted, so that they make one distribution of which each stream has its share.
    """

    def __init__(self, streams: Sequence[tuple[np.ndarray, float]], vocab_size: int, distance: int) -> None:
        self.vocab_size = vocab_size
        counted = [(*_count_pairs(tokens, vocab_size, distance), share) for tokens, share in streams]
        keys = np.concatenate([keys for keys, _, _ in counted])
        weights = np.concatenate([counts * (share / max(counts.sum(), 1)) for _, counts, share in counted])
        self.keys, place = np.unique(keys, return_inverse=True)
        self.weights = np.bincount(place, weights=weights, minlength=len(self.keys))
        self.context_weights = np.bincount(self.keys // vocab_size, weights=self.weights, minlength=vocab_size)
        self.token_weights = np.bincount(self.keys % vocab_size, weights=self.weights, minlength=vocab_size)

    def frequency(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Relative frequency of `second` after `first`; NaN where `first` was never seen."""
        wanted = first * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        weight = np.where(self.keys[place] == wanted, self.weights[place], 0.0)
        context = self.context_weights[first]
        return np.divide(weight, context, out=np.full(len(wanted), np.nan), where=context > 0)

    @cached_property
    def best_guess(self) -> np.ndarray:
        """The likeliest second token after each first, `[V]`; after one never seen, the likeliest of all."""
        guess = np.full(self.vocab_size, np.argmax(self.token_weights))
        # In this order the last entry of each context is its heaviest, and of equals the smallest token.
        order = np.lexsort((-self.keys, self.weights, self.keys // self.vocab_size))
        guess[self.keys[order] // self.vocab_size] = self.keys[order] % self.vocab_size
        return guess


class CountingModel:
    """Uniform, unigram and bigram frequencies of the training split, interpolated.

    P(b|a) = l2 count(ab)/count(a) + l1 count(b)/N + l0/V, without the first term (and rescaled) where a was never
    seen; the unigram model never has that term. The weights l are fitted by expectation-maximisation on the last tenth
    of each training stream with counts from the rest, after which all of it is counted. Each corpus has its share.

    Source: Jelinek and Mercer, Interpolated estimation of Markov source parameters from sparse data, 1980.
    """

    def __init__(self, streams: Mapping[str, Stream], shares: Mapping[str, float], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._streams = [(stream.tokens, shares[name]) for name, stream in streams.items()]
        self._by_distance: dict[int, PairCounts] = {}
        borders = [len(tokens) - len(tokens) // 10 for tokens, _ in self._streams]
        seen = [(tokens[:border], share) for (tokens, share), border in zip(self._streams, borders, strict=True)]
        held_out = [(tokens[border:], share) for (tokens, share), border in zip(self._streams, borders, strict=True)]
        fitted_on, judged_on = PairCounts(seen, vocab_size, 1), PairCounts(held_out, vocab_size, 1)
        first, second = judged_on.keys // vocab_size, judged_on.keys % vocab_size
        parts = _parts(fitted_on, first, second)
        self.unigram_weights = _fit_weights(parts[:2], judged_on.weights)
        # A context without counts says nothing about how far contexts are to be trusted.
        known = ~np.isnan(parts[2])
        self.bigram_weights = _fit_weights(parts[:, known], judged_on.weights[known])

    def pairs(self, distance: int) -> PairCounts:
        """Counts of the whole training split at one distance."""
        if distance not in self._by_distance:
            self._by_distance[distance] = PairCounts(self._streams, self._vocab_size, distance)
        return self._by_distance[distance]

    def probabilities(self, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        """Probability of each `second` token after its `first`, by model."""
        parts = _parts(self.pairs(1), first, second)
        uniform, one, two = self.bigram_weights
        lower = uniform * parts[0] + one * parts[1]
        bigram = np.where(np.isnan(parts[2]), lower / (uniform + one), lower + two * parts[2])
        return {"uniform": parts[0], "unigram": self.unigram_weights @ parts[:2], "bigram": bigram}

    def floors(
        self, batches: Sequence[Batch], sequence_length: int, max_distance: int, byte_lengths: np.ndarray
    ) -> Floors:
        """Floors over the targets `tokens[:, 1:T+1]` of `batches`.

        At distance d, targets whose token d before them lies outside the row or in another document are left out: what
        remains is what a prediction depth of d - 1 can be compared on.
        """
        tokens = np.concatenate([batch.tokens[:, : sequence_length + 1] for batch in batches])
        documents = np.concatenate([batch.documents[:, : sequence_length + 1] for batch in batches])
        targets = tokens[:, 1:].ravel()
        probabilities = self.probabilities(tokens[:, :-1].ravel(), targets)
        nats = {name: float(-np.log(values).sum()) for name, values in probabilities.items()}
        num_bytes = int(byte_lengths[targets].sum())
        return Floors(
            nats_per_token={name: total / len(targets) for name, total in nats.items()},
            nats_per_byte={name: total / num_bytes if num_bytes else math.nan for name, total in nats.items()},
            distance_accuracy={
                distance: self.guess_accuracy(tokens, documents, distance) for distance in range(1, max_distance + 1)
            },
        )

    def guess_accuracy(self, tokens: np.ndarray, documents: np.ndarray, distance: int) -> float:
        """How often the likeliest token `distance` after each of `tokens` is right, within its document."""
        right = self.pairs(distance).best_guess[tokens[:, :-distance]] == tokens[:, distance:]
        inside = documents[:, :-distance] == documents[:, distance:]
        return float(right[inside].mean()) if inside.any() else math.nan


def _count_pairs(tokens: np.ndarray, vocab_size: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys `a * vocab_size + b` and how often each occurs."""
    num_pairs = max(len(tokens) - distance, 0)
    parts = []
    for start in range(0, num_pairs, _CHUNK_TOKENS):
        stop = min(start + _CHUNK_TOKENS, num_pairs)
        keys = tokens[start:stop].astype(np.int64) * vocab_size + tokens[start + distance : stop + distance]
        parts.append(count_keys(keys, vocab_size**2))
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    keys, place = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate([counts for _, counts in parts]))
    return keys, counts.astype(np.int64)


def count_keys(keys: np.ndarray, num_possible: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct values of `keys`, all below `num_possible`, and how often each occurs."""
    if num_possible > len(keys):
        return np.unique(keys, return_counts=True)
    # Where a full table is no larger than the keys themselves, counting is many times faster than sorting.
    table = np.bincount(keys, minlength=num_possible)
    found = np.flatnonzero(table)
    return found, table[found]


def _parts(pairs: PairCounts, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Uniform, unigram and bigram frequency (rows) of each pair (columns)."""
    uniform = np.full(len(first), 1 / pairs.vocab_size)
    total = pairs.token_weights.sum()
    unigram = pairs.token_weights[second] / total if total > 0 else uniform
    return np.stack([uniform, unigram, pairs.frequency(first, second)])


def _fit_weights(parts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The interpolation weights (one per row of `parts`) that make held-out pairs, seen `counts` times, likeliest."""
    weights = np.full(len(parts), 1 / len(parts))
    if counts.sum() == 0:
        return weights
    for _ in range(1000):
        joint = weights[:, None] * parts
        updated = (joint / joint.sum(axis=0)) @ counts / counts.sum()
        has_settled = np.abs(updated - weights).max() < 1e-9
        weights = updated
        if has_settled:
            break
    # None may vanish: what training never showed must keep a probability.
    weights = np.maximum(weights, _SMALLEST_WEIGHT)
    return weights / weights.sum()
