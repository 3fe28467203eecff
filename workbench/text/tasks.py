"""Generated text with known answers. The same fields always give the same documents."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workbench.field_types import require_types
from workbench.text.corpus import Corpus, Document
from workbench.text.order import generator

_LOWER = np.array(list(string.ascii_lowercase))
_UPPER = np.array(list(string.ascii_uppercase))


@dataclass(frozen=True)
class CopyTask(Corpus):
    """`wqbz=wqbz`: random letters, an equals sign, the same letters again.

    What follows the equals sign is certain; each letter before it costs ln(alphabet_size) nats.
    """

    seed: int = 0
    num_documents: int = 4096
    length: int = 16
    alphabet_size: int = 26

    def __post_init__(self) -> None:
        require_types(self)
        _check_sizes(self.num_documents, length=self.length)
        _check_alphabet(self.alphabet_size)

    @property
    def name(self) -> str:
        return f"copy_{self.seed}"

    def documents(self) -> Iterator[Document]:
        draw = generator(self.name)
        letters = _LOWER[draw.integers(self.alphabet_size, size=(self.num_documents, self.length))]
        for i, row in enumerate(letters):
            word = "".join(row)
            yield Document(f"{self.name} {i}", f"{word}={word}")


@dataclass(frozen=True)
class InductionTask(Corpus):
    """`Qf Bz Qf Ba`...: pairs of a random capital and a lower-case letter, which each document chooses anew.

    Within a document a capital is always followed by the same letter, so from its second occurrence on the letter is
    certain to whoever looks back, and costs ln(26) nats to whoever does not.
    """

    seed: int = 0
    num_documents: int = 4096
    num_pairs: int = 16
    num_capitals: int = 6

    def __post_init__(self) -> None:
        require_types(self)
        _check_sizes(self.num_documents, num_pairs=self.num_pairs)
        if not 1 <= self.num_capitals <= len(_UPPER):
            raise ValueError(f"num_capitals={self.num_capitals} must lie in 1..{len(_UPPER)}")

    @property
    def name(self) -> str:
        return f"induction_{self.seed}"

    def documents(self) -> Iterator[Document]:
        draw = generator(self.name)
        for i in range(self.num_documents):
            capitals = draw.permutation(_UPPER)[: self.num_capitals]
            letters = _LOWER[draw.integers(len(_LOWER), size=self.num_capitals)]
            chosen = draw.integers(self.num_capitals, size=self.num_pairs)
            yield Document(f"{self.name} {i}", " ".join(f"{capitals[c]}{letters[c]}" for c in chosen))


@dataclass(frozen=True)
class ModularArithmeticTask(Corpus):
    """`17+85=05`: sums modulo `modulus`, each pair of summands at most once, all numbers padded to one width.

    Since documents never repeat, the validation split holds sums that training never showed.
    """

    seed: int = 0
    modulus: int = 97
    num_documents: int = 8192

    def __post_init__(self) -> None:
        require_types(self)
        if self.modulus < 2:
            raise ValueError(f"modulus={self.modulus} must be at least 2")
        _check_sizes(self.num_documents)
        if self.num_documents > self.modulus**2:
            raise ValueError(f"num_documents={self.num_documents} must lie in 2..{self.modulus**2} (modulus squared)")

    @property
    def name(self) -> str:
        return f"modular_arithmetic_{self.seed}"

    def documents(self) -> Iterator[Document]:
        width = len(str(self.modulus - 1))
        pairs = generator(self.name).permutation(self.modulus**2)[: self.num_documents]
        for i, (left, right) in enumerate(zip(pairs // self.modulus, pairs % self.modulus, strict=True)):
            total = (left + right) % self.modulus
            yield Document(f"{self.name} {i}", f"{left:0{width}}+{right:0{width}}={total:0{width}}")


@dataclass(frozen=True)
class MarkovTask(Corpus):
    """Letters of a first-order Markov chain whose entropy rate is known exactly: no model can stay below it.

    Each row of the transition matrix is drawn from a Dirichlet distribution; the smaller `concentration`, the fewer
    letters usually follow a letter. The first letter comes from the stationary distribution.
    """

    seed: int = 0
    num_documents: int = 512
    length: int = 1024
    alphabet_size: int = 8
    concentration: float = 0.5

    def __post_init__(self) -> None:
        require_types(self)
        _check_sizes(self.num_documents, length=self.length)
        _check_alphabet(self.alphabet_size)
        if not 0.01 <= self.concentration <= 1e6:
            raise ValueError(f"concentration={self.concentration} must lie in 0.01..1e6")

    @property
    def name(self) -> str:
        return f"markov_{self.seed}"

    @property
    def transitions(self) -> np.ndarray:
        """Probability of the next letter (columns) after each letter (rows)."""
        draw = generator(f"{self.name} transitions")
        raw = draw.dirichlet(np.full(self.alphabet_size, self.concentration), size=self.alphabet_size)
        # A positive floor keeps every letter reachable, so that the stationary distribution is unique.
        raised = raw + 1e-6
        return raised / raised.sum(axis=1, keepdims=True)

    @property
    def stationary(self) -> np.ndarray:
        """The share of each letter in the long run."""
        return stationary_distribution(self.transitions)

    @property
    def entropy_rate_nats(self) -> float:
        """Nats per letter that the best possible model pays once it knows the letter before."""
        return entropy_rate_nats(self.transitions)

    def documents(self) -> Iterator[Document]:
        draw = generator(f"{self.name} letters")
        uniform = draw.random((self.length, self.num_documents))
        steps = np.cumsum(self.transitions, axis=1)[:, :-1]
        states = np.empty((self.length, self.num_documents), dtype=np.int64)
        states[0] = np.searchsorted(np.cumsum(self.stationary)[:-1], uniform[0], side="right")
        for i in range(1, self.length):
            states[i] = (uniform[i][:, None] >= steps[states[i - 1]]).sum(axis=1)
        for i, letters in enumerate(_LOWER[states.T]):
            yield Document(f"{self.name} {i}", "".join(letters))


def stationary_distribution(transitions: np.ndarray) -> np.ndarray:
    """The left eigenvector for eigenvalue 1 of a chain whose every state can be reached, as a distribution."""
    size = len(transitions)
    equations = np.vstack([transitions.T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]


def entropy_rate_nats(transitions: np.ndarray) -> float:
    """Mean entropy of the next state, states weighted by the stationary distribution; `transitions` are positive."""
    return float(-stationary_distribution(transitions) @ np.sum(transitions * np.log(transitions), axis=1))


def _check_sizes(num_documents: int, **sizes: int) -> None:
    if num_documents < 2:
        raise ValueError(f"num_documents={num_documents} must be at least 2, one to train on and one to validate")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def _check_alphabet(alphabet_size: int) -> None:
    if not 2 <= alphabet_size <= len(_LOWER):
        raise ValueError(f"alphabet_size={alphabet_size} must lie in 2..{len(_LOWER)}")
