"""Byte-level byte-pair encoding, trained with `tokenizers` on the text that a run trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from workbench.field_types import require_types
from workbench.text.cache import Cache
from workbench.text.tokenizer import Tokenizer, TokenizerSpec

_NUM_BYTES = 256


@dataclass(frozen=True)
class BytePairs(TokenizerSpec):
    """A vocabulary of the 256 bytes, the separator, and the most frequent merges of the training split.

    Every corpus of a mixture counts with all its training documents whatever its weight, so that runs which differ in
    weights alone share one vocabulary and their losses compare.

    Raises:
        ValueError: `vocab_size` is too small to hold the bytes and the separator.
    """

    vocab_size: int = 4096

    def __post_init__(self) -> None:
        require_types(self)
        if self.vocab_size <= _NUM_BYTES:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {_NUM_BYTES + 1}: 256 bytes and a separator"
            )

    def fit(self, texts: Iterable[str], texts_key: str, cache: Cache) -> BytePairTokenizer:
        """The tokenizer for `texts`, trained or from the cache.

        Raises:
            ValueError: the texts have fewer pairs to merge than `vocab_size` asks for.
        """
        key = f"byte_pairs {self.vocab_size} of {texts_key} with tokenizers {tokenizers.__version__}"
        tokenizer = BytePairTokenizer(cache.fetch(key, lambda: self._train(texts)))
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is more than the text yields; it must lie in "
                f"{_NUM_BYTES + 1}..{tokenizer.vocab_size}"
            )
        return tokenizer

    def _train(self, texts: Iterable[str]) -> bytes:
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        # The separator gets its id here and not as a special token, which `tokenizers` would look for within texts.
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return model.to_str().encode()


class BytePairTokenizer(Tokenizer):
    """Merged bytes; the separator is the last id. `serialized` is the JSON of a `tokenizers.Tokenizer`."""

    is_slow = True

    def __init__(self, serialized: bytes) -> None:
        self._model = tokenizers.Tokenizer.from_buffer(serialized)
        self._fingerprint = hashlib.sha256(serialized).hexdigest()
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        by_id = sorted(self._model.get_vocab().items(), key=lambda item: item[1])
        self._bytes = [bytes(byte_of[letter] for letter in token) for token, _ in by_id]

    @property
    def vocab_size(self) -> int:
        return len(self._bytes) + 1

    @property
    def separator(self) -> int:
        return len(self._bytes)

    @property
    def fingerprint(self) -> str:
        return f"byte pairs {self._fingerprint}"

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([*map(len, self._bytes), 0], dtype=np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            text.encode("utf-8")
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        return b"\0" if token == self.separator else self._bytes[token]


def _byte_letters() -> list[str]:
    """The letter by which `tokenizers` writes each byte: itself where it prints, else the next letter from U+0100."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(_NUM_BYTES) if byte not in printed]
    return [chr(byte) if byte in printed else chr(0x100 + hidden.index(byte)) for byte in range(_NUM_BYTES)]
