"""What a corpus is: a name and its documents, always in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text that is never divided between training and validation."""

    name: str
    text: str


class Corpus(ABC):
    """A source of documents. Subclasses are frozen dataclasses, so that a mixture can be written to a run's record."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What curves and tables call this corpus; unique within a mixture."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in the same order every time.

        Raises:
            ValueError: the source is missing, unreadable or empty; one line says which and what to do.
        """


class SlowCorpus(Corpus):
    """A corpus that takes seconds to read, so that its documents are kept in the cache."""

    @abstractmethod
    def source_key(self) -> str:
        """A short text that changes whenever `documents` would; found without reading the documents one by one."""
