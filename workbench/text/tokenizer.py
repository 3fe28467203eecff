"""Text to token ids and back, without loss. Here: raw bytes; `byte_pairs.py` holds the trained vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workbench.text.cache import Cache


class Tokenizer(ABC):
    """A fitted vocabulary in which every Unicode text has one spelling, and one token that ends each document."""

    # Whether encoding takes seconds per 10 MB, so that a corpus's ids are worth keeping.
    is_slow: ClassVar[bool]

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def separator(self) -> int:
        """The id that follows each document."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal only for tokenizers that encode every text alike."""

    @property
    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes per token id, `[V]` int64; the separator stands for no text and has 0."""

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; the separator stands for a NUL."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32, without a separator.

        Raises:
            ValueError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_all([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become replacement characters, a separator becomes a NUL."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        r"""One token for the eye: its text, incomplete characters as `\xNN`, the separator as `<separator>`."""
        if token == self.separator:
            return "<separator>"
        return self.token_bytes(token).decode("utf-8", errors="backslashreplace")


class TokenizerSpec(ABC):
    """Which tokenizer a run uses, before any text is read. Subclasses are frozen dataclasses."""

    @abstractmethod
    def fit(self, texts: Iterable[str], texts_key: str, cache: Cache) -> Tokenizer:
        """The tokenizer for `texts`; `texts_key` names them in `cache`."""


@dataclass(frozen=True)
class Bytes(TokenizerSpec):
    """The 256 bytes as the vocabulary: nothing to train, longest sequences.

    Byte 0 doubles as the separator, so a NUL within a text reads as the end of a document.
    """

    def fit(self, texts: Iterable[str], texts_key: str, cache: Cache) -> ByteTokenizer:
        return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    """A token is a byte."""

    is_slow = False

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def separator(self) -> int:
        return 0

    @property
    def fingerprint(self) -> str:
        return "bytes"

    @property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[self.separator] = 0
        return lengths

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])
