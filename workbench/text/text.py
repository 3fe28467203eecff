"""A mixture made ready for training: documents read, split, tokenized and fingerprinted."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.text.batches import Batch, Batches, check_sizes, validation_batches
from workbench.text.cache import Cache, default_folder
from workbench.text.corpus import Corpus, Document, SlowCorpus
from workbench.text.floors import CountingModel, Floors
from workbench.text.mixture import Mixture
from workbench.text.split import split, text_digest
from workbench.text.stream import Stream
from workbench.text.tokenizer import Bytes, Tokenizer, TokenizerSpec


def load(mixture: Mixture | Corpus, tokenizer: TokenizerSpec | None = None, *, cache_dir: Path | None = None) -> Text:
    """Read, split and tokenize `mixture`. The first time may take half a minute; what is slow is kept in `cache_dir`.

    `tokenizer` is `Bytes()` unless given. `cache_dir` is `moe-workbench` in the user's cache folder unless given.

    Raises:
        ValueError: a corpus cannot be read, is empty or cannot be split; one line says which and why.
    """
    mixture = Mixture({mixture: 1.0}) if isinstance(mixture, Corpus) else mixture
    tokenizer = Bytes() if tokenizer is None else tokenizer
    if not isinstance(mixture, Mixture):
        raise ValueError(f"load needs a Mixture or a corpus, not {mixture!r}")
    if not isinstance(tokenizer, TokenizerSpec):
        raise ValueError(f"tokenizer={tokenizer!r} must be Bytes() or BytePairs(vocab_size=...)")
    cache = Cache(default_folder() if cache_dir is None else Path(cache_dir))
    corpora = [_read(corpus, cache) for corpus in mixture.weights]
    train_texts = [corpus.documents[i].text for corpus in corpora for i in corpus.train]
    texts_key = " ".join(sorted(corpus.digest for corpus in corpora))
    fitted = tokenizer.fit(train_texts, texts_key, cache)
    return Text(mixture, fitted, [_tokenize(corpus, fitted, cache) for corpus in corpora])


class Text:
    """A mixture's token ids, in two splits, and what can be asked of them. Made by `load`."""

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, corpora: Sequence[TokenizedCorpus]) -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.names = mixture.names
        self._corpora = {corpus.name: corpus for corpus in corpora}
        self._train = {corpus.name: corpus.train for corpus in corpora}
        self._validation = {corpus.name: corpus.validation for corpus in corpora}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that batches depend on but their sizes and the seed: texts, split, shares, tokenizer."""
        digest = hashlib.sha256(f"tokenizer {self.tokenizer.fingerprint}\n".encode())
        for name, share in self.mixture.shares.items():
            digest.update(f"corpus {name!r} {self._corpora[name].digest} share {share!r}\n".encode())
            for stream in (self._train[name], self._validation[name]):
                digest.update(hashlib.sha256(stream.documents.astype("<i4").tobytes()).digest())
        return digest.hexdigest()

    def train_tokens(self, name: str) -> int:
        """Tokens of one corpus to train on, separators included."""
        return len(self._train[self._known(name)].tokens)

    def validation_tokens(self, name: str) -> int:
        """Tokens of one corpus to validate on, separators included."""
        return len(self._validation[self._known(name)].tokens)

    def validation_documents(self, name: str) -> list[Document]:
        """The documents of one corpus that no training batch holds."""
        return list(self._corpora[self._known(name)].validation_documents)

    def batches(self, seed: int, batch_size: int, sequence_length: int, lookahead: int = 1) -> Batches:
        """The training batches of one seed: `sequence_length` inputs per row and `lookahead` further targets.

        Raises:
            ValueError: a size is not positive, or a corpus is shorter than one sequence.
        """
        return Batches(
            self._train,
            self.mixture.shares,
            seed=seed,
            batch_size=batch_size,
            sequence_length=sequence_length,
            lookahead=lookahead,
        )

    def validation(
        self, batch_size: int, sequence_length: int, lookahead: int = 1, num_batches: int = 8
    ) -> list[Batch]:
        """Validation batches, the same for every seed: blocks in shuffled order, every corpus by its share.

        No block is repeated, so a small validation split gives fewer than `num_batches`.

        Raises:
            ValueError: a size is not positive, or a corpus has too few blocks for a single batch.
        """
        return validation_batches(
            self._validation,
            self.mixture.shares,
            batch_size=batch_size,
            sequence_length=sequence_length,
            lookahead=lookahead,
            num_batches=num_batches,
        )

    def floors(self, batches: Sequence[Batch], sequence_length: int, max_distance: int = 2) -> Floors:
        """What counting models of the training split reach on the targets `tokens[:, 1:sequence_length+1]`.

        Raises:
            ValueError: there are no batches, or they are shorter than `sequence_length` or `max_distance` asks for.
        """
        check_sizes(sequence_length=sequence_length, max_distance=max_distance)
        if not batches:
            raise ValueError("floors need at least one batch")
        width = min(batch.tokens.shape[1] for batch in batches)
        if width <= sequence_length or max_distance > sequence_length:
            raise ValueError(
                f"rows of {width} tokens are too short for sequence_length={sequence_length} (at most {width - 1}) "
                f"and max_distance={max_distance} (at most sequence_length)"
            )
        return self._counting_model.floors(batches, sequence_length, max_distance, self.tokenizer.byte_lengths)

    @cached_property
    def _counting_model(self) -> CountingModel:
        return CountingModel(self._train, self.mixture.shares, self.tokenizer.vocab_size)

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"no corpus is called {name!r}; there are: {', '.join(self.names)}")
        return name


@dataclass(frozen=True)
class ReadCorpus:
    """A corpus's documents, and which of them (by number) are for what."""

    name: str
    documents: list[Document]
    digest: str
    train: list[int]
    validation: list[int]


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as two streams."""

    name: str
    digest: str
    train: Stream
    validation: Stream
    validation_documents: list[Document]


def _read(corpus: Corpus, cache: Cache) -> ReadCorpus:
    documents = _cached_documents(corpus, cache) if isinstance(corpus, SlowCorpus) else corpus.documents()
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"corpus {corpus.name!r} is empty")
    digests = [text_digest(document.text) for document in documents]
    digest = hashlib.sha256()
    for document, of_text in zip(documents, digests, strict=True):
        digest.update(text_digest(document.name) + of_text)
    try:
        train, validation = split(digests)
    except ValueError as error:
        raise ValueError(f"corpus {corpus.name!r} {error}") from None
    return ReadCorpus(corpus.name, documents, digest.hexdigest(), train, validation)


def _tokenize(corpus: ReadCorpus, tokenizer: Tokenizer, cache: Cache) -> TokenizedCorpus:
    texts = [document.text for document in corpus.documents]
    if tokenizer.is_slow:
        key = f"tokens of {corpus.digest} by {tokenizer.fingerprint}"
        ids = _unpack_ids(cache.fetch(key, lambda: _pack_ids(tokenizer.encode_all(texts))))
    else:
        ids = tokenizer.encode_all(texts)
    return TokenizedCorpus(
        name=corpus.name,
        digest=corpus.digest,
        train=Stream.of(corpus.train, ids, tokenizer.separator, tokenizer.vocab_size),
        validation=Stream.of(corpus.validation, ids, tokenizer.separator, tokenizer.vocab_size),
        validation_documents=[corpus.documents[i] for i in sorted(corpus.validation)],
    )


def _cached_documents(corpus: SlowCorpus, cache: Cache) -> list[Document]:
    def build() -> bytes:
        documents = list(corpus.documents())
        names, texts = [document.name for document in documents], [document.text for document in documents]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"name": names, "text": texts}), buffer, compression="zstd")
        return buffer.getvalue()

    payload = cache.fetch(f"{corpus.name} documents, {corpus.source_key()}", build)
    table = pq.read_table(pa.BufferReader(payload))
    columns = (table.column("name").to_pylist(), table.column("text").to_pylist())
    return [Document(name, text) for name, text in zip(*columns, strict=True)]


def _pack_ids(ids: Sequence[np.ndarray]) -> bytes:
    joined = np.concatenate(ids)
    narrow = joined.astype(np.min_scalar_type(joined.max(initial=0)))
    buffer = io.BytesIO()
    np.savez(buffer, ids=narrow, lengths=np.array([len(part) for part in ids]))
    return buffer.getvalue()


def _unpack_ids(payload: bytes) -> list[np.ndarray]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
