"""The order of reading: a pure function of text, seed and number, that shows every block once per epoch."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.text import Batch, BytePairs, Corpus, Document, Files, MarkovTask, Mixture, Text, load
from workbench.text.mixture import PERIOD, quotas
from workbench.text.split import split, text_digest

T = 32


@dataclass(frozen=True)
class Numbers(Corpus):
    """Documents that say who they are, so that every token can be traced back."""

    title: str
    count: int
    changed: int | None = None

    @property
    def name(self) -> str:
        return self.title

    def documents(self):
        for i in range(self.count):
            yield Document(f"{i}", f"{self.title} {i:05} " * (1 + i % 7) + ("!" if i == self.changed else ""))


MIXTURE = Mixture({Numbers("a", 900): 5, Numbers("b", 450): 2.5, Numbers("c", 240): 0.1})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load(MIXTURE, cache_dir=tmp_path_factory.mktemp("cache"))


def digest(batch: Batch) -> str:
    return hashlib.sha256(batch.tokens.tobytes() + batch.documents.tobytes() + batch.corpus.tobytes()).hexdigest()


def test_batch_is_a_function_of_its_number_alone(text: Text) -> None:
    numbers = [*range(30), 129, 1000, 123456]
    forwards = {i: digest(batches.batch(i)) for batches in [text.batches(7, 8, T)] for i in numbers}
    for order in (numbers[::-1], [5, 123456, 5, 129, 1000, 0]):
        batches = text.batches(7, 8, T)
        assert {i: digest(batches.batch(i)) for i in order} == {i: forwards[i] for i in order}
    assert digest(text.batches(8, 8, T).batch(0)) != forwards[0]
    assert len(set(forwards.values())) == len(forwards)


def test_the_batch_size_only_groups_the_samples(text: Text) -> None:
    small, large = text.batches(1, 3, T), text.batches(1, 6, T)
    joined = np.concatenate([small.batch(4).tokens, small.batch(5).tokens])
    np.testing.assert_array_equal(joined, large.batch(2).tokens)


def test_a_fresh_process_draws_the_same(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * (20 + i))
    script = """
import hashlib, json, sys
from pathlib import Path
from workbench.text import BytePairs, Files, MarkovTask, Mixture, load
mixture = Mixture({Files(sys.argv[1]): 2, MarkovTask(num_documents=40, length=200): 1})
text = load(mixture, BytePairs(270), cache_dir=Path(sys.argv[2]))
batch = text.batches(5, 4, 32).batch(77)
print(json.dumps([text.fingerprint, hashlib.sha256(batch.tokens.tobytes()).hexdigest()]))
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "cache")]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    mixture = Mixture({Files(str(tmp_path)): 2, MarkovTask(num_documents=40, length=200): 1})
    here = load(mixture, BytePairs(270), cache_dir=tmp_path / "other")
    batches = here.batches(5, 4, 32)
    batches.batch(3)
    tokens = batches.batch(77).tokens
    assert json.loads(fresh.stdout) == [here.fingerprint, hashlib.sha256(tokens.tobytes()).hexdigest()]


def test_every_block_once_per_epoch(text: Text) -> None:
    batches = text.batches(0, 4, T)
    drawn: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
    for i in range(1500):
        batch = batches.batch(i)
        for row, number in zip(batch.tokens, batch.corpus, strict=True):
            drawn[int(number)].append(row.tobytes())
    for number, name in enumerate(text.names):
        size = batches.blocks_per_epoch[name]
        assert size > 1
        rows = drawn[number]
        assert len(rows) / size == pytest.approx(batches.epochs(1500)[name])
        whole = [Counter(rows[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
        if number < 2:
            assert len(whole) >= 2
        assert all(epoch == whole[0] and max(epoch.values()) == 1 for epoch in whole)
        if len(whole) > 1:
            assert rows[:size] != rows[size : 2 * size]


def test_epochs_are_counted(text: Text) -> None:
    batches = text.batches(0, 8, T)
    assert batches.epochs(0) == {"a": 0, "b": 0, "c": 0}
    numbers = np.concatenate([batches.batch(i).corpus for i in range(300)])
    for number, name in enumerate(text.names):
        expected = np.count_nonzero(numbers == number) / batches.blocks_per_epoch[name]
        assert batches.epochs(300)[name] == pytest.approx(expected)


def test_shares_hold_within_one_sample_per_period(text: Text) -> None:
    batches = text.batches(3, 64, T)
    per_period = PERIOD // 64
    for period in (0, 1, 17):
        numbers = np.concatenate([batches.batch(period * per_period + i).corpus for i in range(per_period)])
        for number, share in enumerate(MIXTURE.shares.values()):
            assert abs(np.count_nonzero(numbers == number) - share * PERIOD) < 1
        # Shuffled, not in turn: the first quarter holds both of the large corpora.
        assert {0, 1} <= set(numbers[: PERIOD // 4].tolist())


def test_rows_are_consecutive_text_with_document_numbers(text: Text) -> None:
    batches = text.batches(2, 16, T, lookahead=3)
    several = 0
    for i in range(20):
        batch = batches.batch(i)
        assert batch.tokens.shape == batch.documents.shape == (16, T + 3)
        assert (batch.tokens.dtype, batch.documents.dtype, batch.corpus.dtype) == (np.int64, np.int32, np.int32)
        for tokens, documents, number in zip(batch.tokens, batch.documents, batch.corpus, strict=True):
            name = text.names[number]
            ends = np.flatnonzero(tokens == text.tokenizer.separator)
            # A document's number changes exactly after its separator.
            np.testing.assert_array_equal(np.flatnonzero(np.diff(documents)), ends[ends < T + 2])
            several += len(ends) > 1
            start = 0
            for stop in [*ends, T + 3]:
                for document in documents[start:stop]:
                    assert text.tokenizer.decode(tokens[start:stop]) in f"{name} {document:05} " * 9
                start = stop + 1
    assert several > 10


def validation_rows(batches: list[Batch]) -> list[tuple[int, bytes]]:
    return [(int(n), row.tobytes()) for batch in batches for n, row in zip(batch.corpus, batch.tokens, strict=True)]


def test_validation_is_fixed_distinct_and_by_share(text: Text) -> None:
    first = text.validation(8, T, num_batches=4)
    assert [digest(batch) for batch in text.validation(8, T, num_batches=4)] == [digest(batch) for batch in first]
    rows = validation_rows(first)
    assert len(set(rows)) == len(rows) == 32
    counts = Counter(number for number, _ in rows)
    # 32 rows by 5 : 2.5 : 0.1 are 21.05, 10.53 and 0.42; the smallest, left without, gets one of the largest.
    assert counts == {0: 20, 1: 11, 2: 1}
    assert [number for number, _ in rows] != sorted(number for number, _ in rows)
    # As many as there are distinct blocks for, when that is less than asked for.
    fewer = text.validation(8, T, num_batches=1000)
    assert 4 <= len(fewer) < 1000
    assert len(set(validation_rows(fewer))) == len(validation_rows(fewer))


def test_train_and_validation_are_disjoint(text: Text) -> None:
    batches = text.batches(0, 32, T)
    train = {
        (int(n), int(d))
        for i in range(250)
        for b in [batches.batch(i)]
        for n, row in zip(b.corpus, b.documents, strict=True)
        for d in row
    }
    kept = {
        (int(n), int(d))
        for b in text.validation(8, T, num_batches=1000)
        for n, row in zip(b.corpus, b.documents, strict=True)
        for d in row
    }
    assert len(train) > 400 and len(kept) > 10
    assert not train & kept
    for number, name in enumerate(text.names):
        documents = text.validation_documents(name)
        assert {d for n, d in kept if n == number} <= {int(document.name) for document in documents}
        assert not {d for n, d in train if n == number} & {int(document.name) for document in documents}
        assert text.validation_tokens(name) == sum(len(document.text) + 1 for document in documents)


def test_copies_never_train_and_validate() -> None:
    digests = [text_digest(f"{i % 60}") for i in range(300)]
    train, validation = split(digests)
    assert sorted(train + validation) == list(range(300))
    assert validation and not {i % 60 for i in train} & {i % 60 for i in validation}
    # Adding documents moves none to the other side.
    more_train, more_validation = split([*digests, *(text_digest(f"new {i}") for i in range(500))])
    assert set(train) <= set(more_train) and set(validation) <= set(more_validation)
    assert 0.02 < len([i for i in more_validation if i >= 300]) / 500 < 0.1


@settings(deadline=None)
@given(st.integers(2, 30))
def test_a_split_always_has_two_sides(count: int) -> None:
    train, validation = split([text_digest(f"{i}") for i in range(count)])
    assert train and validation


def test_any_change_changes_the_fingerprint(tmp_path: Path) -> None:
    base = load(Mixture({Numbers("a", 60): 1}), cache_dir=tmp_path).fingerprint
    assert load(Numbers("a", 60), cache_dir=tmp_path).fingerprint == base
    for i in range(60):
        assert load(Numbers("a", 60, changed=i), cache_dir=tmp_path).fingerprint != base
    others = [
        load(Numbers("b", 60), cache_dir=tmp_path),
        load(Numbers("a", 61), cache_dir=tmp_path),
        load(Numbers("a", 60), BytePairs(260), cache_dir=tmp_path),
        load(Mixture({Numbers("a", 60): 1, Numbers("b", 60): 1}), cache_dir=tmp_path),
        load(Mixture({Numbers("a", 60): 2, Numbers("b", 60): 1}), cache_dir=tmp_path),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


@dataclass(frozen=True)
class WithEmpty(Corpus):
    """Every other document is empty."""

    @property
    def name(self) -> str:
        return "with_empty"

    def documents(self):
        for i in range(200):
            yield Document(f"{i}", f"text {i}" if i % 2 else "")


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    text = load(WithEmpty(), cache_dir=tmp_path)
    tokens = text.batches(0, 8, 24).batch(0).tokens
    assert not ((tokens[:, 1:] == text.tokenizer.separator) & (tokens[:, :-1] == text.tokenizer.separator)).any()
    assert all(document.text for document in text.validation_documents("with_empty"))


def test_byte_pair_ids_are_kept(tmp_path: Path) -> None:
    first = load(MIXTURE, BytePairs(270), cache_dir=tmp_path)
    kept = sorted(tmp_path.iterdir())
    again = load(MIXTURE, BytePairs(270), cache_dir=tmp_path)
    assert sorted(tmp_path.iterdir()) == kept and len(kept) == 4
    assert digest(first.batches(0, 8, T).batch(0)) == digest(again.batches(0, 8, T).batch(0))
    decoded = "".join(first.tokenizer.decode(row) for row in first.batches(0, 8, T).batch(0).tokens)
    assert "a 00" in decoded and "b 00" in decoded


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 3000))
def test_quotas_sum_and_stay_within_one(weights: list[float], total: int) -> None:
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    counts = quotas(shares, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - share * total) < 1 + 1e-6 for name, share in shares.items())


def test_mixture(text: Text) -> None:
    weights: dict[Corpus, float] = {Numbers("a", 3): 3, Numbers("b", 3): 1}
    mixture = Mixture(weights)
    weights.clear()
    assert list(mixture.weights.values()) == [3, 1]
    assert mixture.shares == {"a": 0.75, "b": 0.25} and mixture.names == ("a", "b")
    same = Mixture({Numbers("a", 3): 3.0, Numbers("b", 3): 1.0})
    assert same == mixture and hash(same) == hash(mixture)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({}, "must map at least one corpus"),
        ({Numbers("a", 3): 0}, "weight 0 of a must be a positive finite number"),
        ({Numbers("a", 3): -1.0}, "weight -1.0 of a must be"),
        ({Numbers("a", 3): float("nan")}, "weight nan of a must be"),
        ({Numbers("a", 3): float("inf")}, "weight inf of a must be"),
        ({Numbers("a", 3): "1"}, "weight '1' of a must be"),
        ({"a": 1}, "may only name corpora, not 'a'"),
        ({Numbers("a", 3): 1, Numbers("a", 4): 1}, "two corpora of the mixture are called 'a'"),
        ({Numbers("a", 3): 1, Numbers("b", 4): 1e-4}, "share 0.0001 of b is too small; it must be at least 1/1024"),
    ],
)
def test_refused_mixtures(weights, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Mixture(weights)


def test_refused_sizes_and_names(text: Text, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        text.batches(0, 0, T)
    with pytest.raises(ValueError, match=r"seed=1\.5 must be a whole number"):
        text.batches(1.5, 1, T)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lookahead=0 must be"):
        text.batches(0, 1, T, lookahead=0)
    with pytest.raises(ValueError, match="batch -1 does not exist"):
        text.batches(0, 1, T).batch(-1)
    with pytest.raises(ValueError, match="no corpus is called 'd'; there are: a, b, c"):
        text.train_tokens("d")
    with pytest.raises(ValueError, match="2 validation rows cannot hold each of 3 corpora"):
        text.validation(2, T, num_batches=1)
    with pytest.raises(
        ValueError, match=r"corpus 'a' has \d+ validation blocks of 32 tokens, fewer than the 658 of one"
    ):
        text.validation(1000, T)
    with pytest.raises(ValueError, match="load needs a Mixture or a corpus, not 'stdlib'"):
        load("stdlib")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer='bytes' must be"):
        load(MIXTURE, "bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="corpus 'a' is empty"):
        load(Numbers("a", 0), cache_dir=tmp_path)
