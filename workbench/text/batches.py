"""The order in which a run reads its text: batch i is a function of the text, the seed and i, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.text.mixture import PERIOD, quotas
from workbench.text.order import permutation
from workbench.text.stream import Stream


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of consecutive tokens: inputs `tokens[:, :T]`, their next tokens `tokens[:, 1:T+1]`, and so on.

    `tokens` and `documents` are `[B, T + lookahead]`, int64 and int32. `documents` numbers each token's document within
    its corpus; a separator belongs to the document that it ends. `corpus` `[B]` int32 is each row's place in
    `Text.names`.
    """

    tokens: np.ndarray
    documents: np.ndarray
    corpus: np.ndarray


class Batches:
    """An endless sequence of training batches; reading one leaves no trace in the others.

    Samples are numbered through all batches. Every 1024 of them hold a fixed number of each corpus (its share, within
    one sample) in an order drawn from the seed. The m-th sample of a corpus with n blocks is block m mod n of a shuffle
    drawn for epoch m div n, so that an epoch shows every block once.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        shares: Mapping[str, float],
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        lookahead: int,
    ) -> None:
        check_sizes(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead)
        if not isinstance(seed, int | np.integer):
            raise ValueError(f"seed={seed!r} must be a whole number")
        self.seed = int(seed)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.lookahead = lookahead
        self.blocks_per_epoch = {
            name: count_blocks(name, stream, "training", sequence_length, lookahead) for name, stream in streams.items()
        }
        self._names = tuple(streams)
        self._streams = streams
        self._quotas = quotas(shares, PERIOD)
        # The newest shuffle of each corpus, and of the slots: only speed depends on what is in here.
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, i: int) -> Batch:
        """Batch `i`, counted from 0."""
        first = self._first_sample(i)
        rows = [self._row(sample) for sample in range(first, first + self.batch_size)]
        return stack(self._names, self._streams, rows, self.sequence_length, self.lookahead)

    def epochs(self, i: int) -> dict[str, float]:
        """How often each corpus was read before batch `i` is drawn: 0 at first, 1 after every block was shown once."""
        period, slot = divmod(self._first_sample(i), PERIOD)
        begun = self._slots(period)[:slot]
        return {
            name: (period * self._quotas[name] + int(np.count_nonzero(begun == number))) / self.blocks_per_epoch[name]
            for number, name in enumerate(self._names)
        }

    def _first_sample(self, i: int) -> int:
        if i < 0:
            raise ValueError(f"batch {i} does not exist; batches are numbered from 0")
        return int(i) * self.batch_size

    def _row(self, sample: int) -> tuple[int, int]:
        """Corpus number and block of one sample."""
        period, slot = divmod(sample, PERIOD)
        slots = self._slots(period)
        number = int(slots[slot])
        name = self._names[number]
        drawn_before = period * self._quotas[name] + int(np.count_nonzero(slots[:slot] == number))
        epoch, position = divmod(drawn_before, self.blocks_per_epoch[name])
        order = self._order(f"blocks of {name}", epoch, self.blocks_per_epoch[name])
        return number, int(order[position])

    def _slots(self, period: int) -> np.ndarray:
        """The corpus number of each sample of a period."""
        in_turn = np.repeat(np.arange(len(self._names)), [self._quotas[name] for name in self._names])
        return in_turn[self._order("slots", period, PERIOD)]

    def _order(self, what: str, turn: int, size: int) -> np.ndarray:
        known_turn, order = self._orders.get(what, (-1, np.empty(0)))
        if known_turn != turn:
            order = permutation(size, self.seed, what, turn)
            self._orders[what] = (turn, order)
        return order


def validation_batches(
    streams: Mapping[str, Stream],
    shares: Mapping[str, float],
    *,
    batch_size: int,
    sequence_length: int,
    lookahead: int,
    num_batches: int,
) -> list[Batch]:
    """At most `num_batches` batches of distinct blocks, every corpus by its share, in an order that no seed moves."""
    check_sizes(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead, num_batches=num_batches)
    if batch_size * num_batches < len(streams):
        raise ValueError(f"{batch_size * num_batches} validation rows cannot hold each of {len(streams)} corpora")
    available = {
        name: count_blocks(name, stream, "validation", sequence_length, lookahead) for name, stream in streams.items()
    }
    wanted = _validation_quotas(shares, batch_size * num_batches)
    while num_batches > 1 and any(wanted[name] > available[name] for name in streams):
        num_batches -= 1
        wanted = _validation_quotas(shares, batch_size * num_batches)
    for name in streams:
        if wanted[name] > available[name]:
            raise ValueError(
                f"corpus {name!r} has {available[name]} validation blocks of {sequence_length} tokens, fewer than the "
                f"{wanted[name]} of one batch; lower batch_size={batch_size} or sequence_length={sequence_length}"
            )
    rows = [
        (number, int(block))
        for number, name in enumerate(streams)
        for block in permutation(available[name], "validation", name)[: wanted[name]]
    ]
    rows = [rows[i] for i in permutation(len(rows), "validation rows")]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [stack(tuple(streams), streams, group, sequence_length, lookahead) for group in groups]


def _validation_quotas(shares: Mapping[str, float], num_rows: int) -> dict[str, int]:
    wanted = quotas(shares, num_rows)
    for name in wanted:
        # A corpus too small for a row of its own gets one from the largest.
        if wanted[name] == 0:
            wanted[max(wanted, key=lambda other: wanted[other])] -= 1
            wanted[name] = 1
    return wanted


def stack(
    names: Sequence[str],
    streams: Mapping[str, Stream],
    rows: Sequence[tuple[int, int]],
    sequence_length: int,
    lookahead: int,
) -> Batch:
    """One batch of `rows`, given as (corpus number, block)."""
    blocks = [streams[names[number]].block(block, sequence_length, lookahead) for number, block in rows]
    return Batch(
        tokens=np.stack([tokens for tokens, _ in blocks]).astype(np.int64),
        documents=np.stack([documents for _, documents in blocks]),
        corpus=np.array([number for number, _ in rows], dtype=np.int32),
    )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError naming the first of `sizes` that is not a positive whole number."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size} must be a whole number of at least 1")


def count_blocks(name: str, stream: Stream, split: str, sequence_length: int, lookahead: int) -> int:
    """Blocks of a corpus's `split`.

    Raises:
        ValueError: there is not one.
    """
    count = stream.num_blocks(sequence_length, lookahead)
    if count == 0:
        raise ValueError(
            f"corpus {name!r} is too short: its {split} split has {len(stream.tokens)} tokens, fewer than one sequence "
            f"of {sequence_length} + {lookahead} (sequence_length + lookahead)"
        )
    return count
