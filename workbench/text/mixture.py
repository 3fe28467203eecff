"""How much of each corpus a run reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.text.corpus import Corpus

# The order of a run repeats its shares in every so many samples, so this is also the smallest share's denominator.
PERIOD = 1024


@dataclass(frozen=True)
class Mixture:
    """Corpora with weights: `Mixture({StdlibCode(): 3, StdlibProse(): 1})` draws three samples of code to one of prose.

    Weights are kept as given; `shares` are the same numbers divided by their sum. The order of the corpora is that of
    `names` and of `Batch.corpus`.

    Raises:
        ValueError: no corpus, a weight that is not a positive finite number, a share too small to be drawn in every
            period, or two corpora of one name.
    """

    weights: Mapping[Corpus, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ValueError(f"Mixture weights={self.weights!r} must map at least one corpus to a positive number")
        for corpus, weight in self.weights.items():
            if not isinstance(corpus, Corpus):
                raise ValueError(f"Mixture weights may only name corpora, not {corpus!r}")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"weight {weight!r} of {corpus.name} must be a positive finite number")
            if not 0 < weight < math.inf:
                raise ValueError(f"weight {weight} of {corpus.name} must be a positive finite number")
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two corpora of the mixture are called {name!r}; names must differ")
        # A private copy: whoever built the mixture may go on changing the mapping that was passed in.
        object.__setattr__(self, "weights", {corpus: float(weight) for corpus, weight in self.weights.items()})
        for name, share in self.shares.items():
            if share * PERIOD < 1:
                raise ValueError(f"share {share:.3g} of {name} is too small; it must be at least 1/{PERIOD}")

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """The corpora's names in the mixture's order."""
        return tuple(corpus.name for corpus in self.weights)

    @property
    def shares(self) -> dict[str, float]:
        """Each corpus's part of the samples; they sum to 1."""
        total = math.fsum(self.weights.values())
        return {corpus.name: weight / total for corpus, weight in self.weights.items()}


def quotas(shares: Mapping[str, float], num_samples: int) -> dict[str, int]:
    """`num_samples` whole samples divided by `shares`, each within one of the exact number (largest remainder)."""
    exact = {name: share * num_samples for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num_samples - sum(counts.values())]:
        counts[name] += 1
    return counts
