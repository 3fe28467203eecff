"""Documents laid end to end as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Stream:
    """Token ids of several documents, each followed by a separator.

    `starts` holds where each document begins in `tokens`, `documents` its number within the corpus.
    """

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[int], ids: Sequence[np.ndarray], separator: int, vocab_size: int) -> Stream:
        """The stream of the documents with the given numbers; `ids` are those of the whole corpus."""
        end = np.array([separator])
        tokens = np.concatenate([part for i in documents for part in (ids[i], end)])
        lengths = np.array([len(ids[i]) + 1 for i in documents])
        # The narrowest type: a corpus of bytes takes one byte per token.
        narrow = tokens.astype(np.min_scalar_type(vocab_size - 1))
        return cls(narrow, np.cumsum(lengths) - lengths, np.array(documents, dtype=np.int32))

    def num_blocks(self, sequence_length: int, lookahead: int) -> int:
        """How many blocks of `sequence_length` inputs there are whose targets, too, lie in the stream."""
        return max(len(self.tokens) - lookahead, 0) // sequence_length

    def block(self, index: int, sequence_length: int, lookahead: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and document numbers of one block. Inputs of different blocks never overlap."""
        start = index * sequence_length
        stop = start + sequence_length + lookahead
        owner = np.searchsorted(self.starts, np.arange(start, stop), side="right") - 1
        return self.tokens[start:stop], self.documents[owner]
