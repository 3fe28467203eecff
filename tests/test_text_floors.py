"""Floors against a plain count by hand and against a slow dense twin."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from workbench.text import Batch, BytePairs, Corpus, Document, Mixture, Text, load
from workbench.text.floors import PairCounts, count_keys

T = 24


@dataclass(frozen=True)
class Verses(Corpus):
    """Random words of a small dictionary and a few random letters: some structure, some chance."""

    seed: int
    count: int = 150

    @property
    def name(self) -> str:
        return f"verses_{self.seed}"

    def documents(self):
        draw = np.random.default_rng(self.seed)
        words = ["".join(chr(97 + c) for c in draw.integers(0, 9 + self.seed, size=n)) for n in draw.integers(1, 6, 30)]
        for i in range(self.count):
            noise = [chr(c) for c in draw.integers(33, 126, size=2)]
            yield Document(f"{i}", " ".join([*(words[w] for w in draw.integers(0, len(words), size=20)), *noise]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load(Mixture({Verses(1): 3, Verses(2): 1}), cache_dir=tmp_path_factory.mktemp("cache"))


def test_counts_by_hand() -> None:
    # a b a b a c: ab ab ac ba ba, and at distance two aa aa bb bc.
    tokens = np.array([0, 1, 0, 1, 0, 2], dtype=np.uint8)
    pairs = PairCounts([(tokens, 1.0)], vocab_size=4, distance=1)
    np.testing.assert_allclose(pairs.frequency(np.array([0, 0, 0, 1]), np.array([1, 2, 0, 0])), [2 / 3, 1 / 3, 0, 1])
    assert np.isnan(pairs.frequency(np.array([3]), np.array([0]))).all()
    # After c and d nothing was seen: the likeliest second token of all, of equals the smallest.
    assert pairs.best_guess.tolist() == [1, 0, 0, 0]
    assert PairCounts([(tokens, 1.0)], vocab_size=4, distance=2).best_guess.tolist() == [0, 1, 0, 0]
    assert PairCounts([(tokens[:2], 1.0)], vocab_size=4, distance=2).best_guess.tolist() == [0, 0, 0, 0]


def test_streams_count_by_share_and_not_by_length() -> None:
    short, long = np.array([0, 1, 0, 1]), np.array([0, 2] * 500)
    pairs = PairCounts([(short, 0.75), (long, 0.25)], vocab_size=3, distance=1)
    assert pairs.frequency(np.array([0]), np.array([1]))[0] == pytest.approx(0.5 / (0.5 + 0.25 * 500 / 999))
    assert pairs.best_guess[0] == 1


def test_a_chunked_count_is_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, size=1000).astype(np.uint16)
    whole = PairCounts([(tokens, 1.0)], vocab_size=50, distance=2)
    monkeypatch.setattr("workbench.text.floors._CHUNK_TOKENS", 64)
    chunked = PairCounts([(tokens, 1.0)], vocab_size=50, distance=2)
    np.testing.assert_array_equal(whole.keys, chunked.keys)
    np.testing.assert_array_equal(whole.weights, chunked.weights)


def test_counting_by_table_and_by_sorting_agree() -> None:
    keys = np.random.default_rng(0).integers(0, 90, size=1000)
    for by_table, by_sorting in zip(count_keys(keys, 90), count_keys(keys, 10**9), strict=True):
        np.testing.assert_array_equal(by_table, by_sorting)


def dense_frequencies(text: Text) -> tuple[np.ndarray, np.ndarray]:
    """Unigram `[V]` and bigram `[V, V]` frequencies from loops over the training documents, in no particular order."""
    size = text.tokenizer.vocab_size
    joint = np.zeros((size, size))
    for corpus, share in zip(text.mixture.weights, text.mixture.shares.values(), strict=True):
        kept = {document.name for document in text.validation_documents(corpus.name)}
        counts = np.zeros((size, size))
        for document in corpus.documents():
            if document.name not in kept:
                ids = [*text.tokenizer.encode(document.text), text.tokenizer.separator]
                for first, second in pairwise(ids):
                    counts[first, second] += 1
        joint += share * counts / counts.sum()
    return joint.sum(axis=0), joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-300)


def test_floors_equal_a_dense_twin(text: Text) -> None:
    batches = text.validation(8, T, lookahead=2, num_batches=3)
    floors = text.floors(batches, T)
    unigram, bigram = dense_frequencies(text)
    weights = text._counting_model.bigram_weights
    targets = [(a, b) for batch in batches for row in batch.tokens for a, b in pairwise(row[: T + 1])]
    # Pairs across a document's end are counted by the model and not by the twin.
    inside = [(a, b) for a, b in targets if a != text.tokenizer.separator]
    expected = np.array([weights @ [1 / 256, unigram[b], bigram[a, b]] for a, b in inside])
    first, second = (np.array(side) for side in zip(*inside, strict=True))
    found = text._counting_model.probabilities(first, second)
    np.testing.assert_allclose(found["bigram"], expected, rtol=0.02)
    all_first, all_second = (np.array(side) for side in zip(*targets, strict=True))
    for name, values in text._counting_model.probabilities(all_first, all_second).items():
        nats = -np.log(values).sum()
        assert floors.nats_per_token[name] == pytest.approx(nats / len(targets))
        num_bytes = sum(b != text.tokenizer.separator for _, b in targets)
        assert floors.nats_per_byte[name] == pytest.approx(nats / num_bytes)
    assert floors.nats_per_token["uniform"] == pytest.approx(math.log(256))
    assert floors.nats_per_token["bigram"] < floors.nats_per_token["unigram"] < floors.nats_per_token["uniform"]


def test_probabilities_sum_to_one(text: Text) -> None:
    every = np.arange(256)
    # A letter, the separator, and a byte that no document holds.
    for context in (ord("a"), 0, 200):
        for name, values in text._counting_model.probabilities(np.full(256, context), every).items():
            assert values.sum() == pytest.approx(1), name
            assert (values > 0).all()


def test_weights_are_fitted_without_validation(text: Text) -> None:
    """The fitted weights are better on held-out training text than any neighbour."""
    model = text._counting_model
    streams = [(stream.tokens, text.mixture.shares[name]) for name, stream in text._train.items()]
    borders = [len(tokens) - len(tokens) // 10 for tokens, _ in streams]
    seen = PairCounts([(t[:n], s) for (t, s), n in zip(streams, borders, strict=True)], 256, 1)
    held = PairCounts([(t[n:], s) for (t, s), n in zip(streams, borders, strict=True)], 256, 1)
    first, second = held.keys // 256, held.keys % 256
    parts = np.stack(
        [
            np.full(len(first), 1 / 256),
            seen.token_weights[second] / seen.token_weights.sum(),
            seen.frequency(first, second),
        ]
    )

    known = ~np.isnan(parts[2])

    def loss(weights: np.ndarray) -> float:
        return float(-(held.weights * np.log(weights @ parts))[known].sum())

    assert model.bigram_weights.sum() == pytest.approx(1)
    best = loss(model.bigram_weights)
    assert model.bigram_weights.min() > 0.0005
    for move in ([1, -1, 0], [0, 1, -1], [1, 0, -1], [-1, 1, 0], [0, -1, 1], [-1, 0, 1]):
        assert loss(model.bigram_weights + 0.0005 * np.array(move)) > best


def test_distance_accuracy_by_hand(text: Text) -> None:
    batches = text.validation(8, T, num_batches=2)
    floors = text.floors(batches, T, max_distance=3)
    for distance in (1, 2, 3):
        guess = text._counting_model.pairs(distance).best_guess
        rows = [pair for batch in batches for pair in zip(batch.tokens, batch.documents, strict=True)]
        right = [
            guess[row[i]] == row[i + distance]
            for row, document in rows
            for i in range(T + 1 - distance)
            if document[i] == document[i + distance]
        ]
        assert floors.distance_accuracy[distance] == pytest.approx(np.mean(right))
    assert list(floors.distance_accuracy) == [1, 2, 3]
    assert floors.distance_accuracy[1] > 0.15


def test_a_large_vocabulary_needs_no_square_table(text: Text) -> None:
    tokens = np.random.default_rng(0).integers(0, 32768, size=20000).astype(np.uint16)
    pairs = PairCounts([(tokens, 1.0)], vocab_size=32768, distance=1)
    assert pairs.keys.nbytes + pairs.weights.nbytes < 1e6
    assert pairs.frequency(tokens[:1].astype(np.int64), tokens[1:2].astype(np.int64))[0] > 0


def test_byte_pairs_have_floors_too(tmp_path: Path) -> None:
    text = load(Verses(1), BytePairs(300), cache_dir=tmp_path)
    batches = text.validation(4, T, num_batches=2)
    floors = text.floors(batches, T)
    lengths = text.tokenizer.byte_lengths
    num_bytes = sum(lengths[batch.tokens[:, 1 : T + 1]].sum() for batch in batches)
    assert floors.nats_per_byte["uniform"] == pytest.approx(math.log(300) * 8 * T / num_bytes)
    assert floors.nats_per_byte["bigram"] < floors.nats_per_byte["unigram"] < floors.nats_per_byte["uniform"]


def test_refusals(text: Text) -> None:
    batches = text.validation(4, T, num_batches=1)
    with pytest.raises(ValueError, match="at least one batch"):
        text.floors([], T)
    with pytest.raises(ValueError, match=r"rows of 25 tokens are too short for sequence_length=25 \(at most 24\)"):
        text.floors(batches, T + 1)
    with pytest.raises(ValueError, match="max_distance=25"):
        text.floors(batches, T, max_distance=T + 1)


def test_nothing_but_the_targets_counts(text: Text) -> None:
    batches = text.validation(4, T, lookahead=3, num_batches=1)
    changed = batches[0].tokens.copy()
    changed[:, T + 1 :] = 0
    twin = Batch(changed, batches[0].documents, batches[0].corpus)
    assert text.floors([twin], T, 3) == text.floors(batches, T, 3)
