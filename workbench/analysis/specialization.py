"""Whether experts prefer a corpus, beside what chance alone would show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.analysis.routing import checked_counts, load_fractions


@dataclass(frozen=True, kw_only=True)
class DocumentRouting:
    """What the experts of one model took of a set of documents.

    `load` is [documents, L, E], `labels` the corpus of each document. `indices` maps a layer to the experts that each
    token chose, [N, A], documents one after the other.

    Raises:
        ValueError: `load`, `labels` and `layer_names` do not fit one another.
    """

    layer_names: tuple[str, ...]
    labels: tuple[str, ...]
    load: np.ndarray
    indices: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.load.ndim != 3 or self.load.shape[:2] != (len(self.labels), len(self.layer_names)):
            raise ValueError(
                f"load of shape {self.load.shape} must be [documents, layers, experts] for {len(self.labels)} labels "
                f"and {len(self.layer_names)} layer names"
            )
        checked_counts(self.load)

    def by_corpus(self) -> dict[str, np.ndarray]:
        """Each corpus's load, [L, E], summed over its documents."""
        labels = np.array(self.labels)
        return {name: self.load[labels == name].sum(0) for name in dict.fromkeys(self.labels)}


@dataclass(frozen=True, kw_only=True)
class SpecializationReport:
    """`frame` has one row per seed and layer, `all layers` being their mean; `verdict` is one line on the latter."""

    frame: pd.DataFrame
    above: bool
    verdict: str


def specialization(load_by_corpus: Mapping[str, np.ndarray]) -> np.ndarray:
    """Jensen-Shannon divergence between the corpora's load fractions per layer, in nats.

    Corpora weigh the same whatever their size, so that it is also the mutual information between expert and corpus for
    a token of a corpus drawn by lot: 0 when all corpora use the experts alike, ln(number of corpora) when no expert
    serves two. It is biased upwards on few tokens; hence `specialization_report`.

    Raises:
        ValueError: fewer than two corpora, or their shapes differ.

    Source: Lin, IEEE Transactions on Information Theory 37 (1991), 145-151, section IV.
    """
    shapes = {name: np.shape(load) for name, load in load_by_corpus.items()}
    if len(shapes) < 2 or len(set(shapes.values())) != 1:
        raise ValueError(f"specialization compares two or more corpora of the same shape [L, E], not {shapes}")
    return divergence(np.stack([checked_counts(load) for load in load_by_corpus.values()]))


def divergence(load: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the corpora of `load`, [..., corpora, L, E] -> [..., L], in nats."""
    fractions = load_fractions(load)
    return plain_entropy(fractions.mean(-3)) - plain_entropy(fractions).mean(-2)


def plain_entropy(fractions: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis."""
    return -np.sum(fractions * np.log(np.where(fractions > 0, fractions, 1.0)), axis=-1)


def specialization_report(
    routing_by_seed: Mapping[int, DocumentRouting],
    *,
    permutations: int = 200,
    interval: float = 0.95,
    shuffle_seed: int = 0,
) -> SpecializationReport:
    """`specialization` of models trained with several seeds, beside a baseline of shuffled labels.

    The baseline gives the corpora's labels to the documents by lot, `permutations` times: whole documents, since the
    tokens of one document resemble each other whatever corpus it comes from. A figure is above the baseline when it
    exceeds the upper end of the central `interval`; the verdict asks this of every seed.

    Raises:
        ValueError: fewer than 3 seeds, 2 corpora or 2 documents of a corpus; layers or corpora that differ between the
            seeds; `permutations` or `interval` out of range.
    """
    if len(routing_by_seed) < 3:
        raise ValueError(f"{len(routing_by_seed)} seeds were given: a report needs at least 3")
    if permutations < 100:
        raise ValueError(f"permutations={permutations} must be at least 100")
    if not 0.5 <= interval < 1:
        raise ValueError(f"interval={interval} must lie in 0.5..1 (1 excluded)")
    models = {(routing.layer_names, frozenset(routing.labels)) for routing in routing_by_seed.values()}
    if len(models) != 1:
        raise ValueError("the seeds must share their layers and corpora")
    rows: list[dict[str, object]] = []
    for seed, routing in routing_by_seed.items():
        observed_L = specialization(routing.by_corpus())
        shuffled_L = shuffled_specialization(routing, permutations, np.random.default_rng([shuffle_seed, seed]))
        names = [*routing.layer_names, "all layers"]
        observed = np.append(observed_L, observed_L.mean())
        shuffled = np.column_stack([shuffled_L, shuffled_L.mean(1)])
        low, high = np.quantile(shuffled, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
        for i, name in enumerate(names):
            rows.append(
                {
                    "seed": seed,
                    "layer": name,
                    "specialization_nats": observed[i],
                    "shuffled_mean_nats": shuffled[:, i].mean(),
                    "shuffled_low_nats": low[i],
                    "shuffled_high_nats": high[i],
                    "above": bool(observed[i] > high[i]),
                }
            )
    frame = pd.DataFrame(rows)
    whole = frame[frame["layer"] == "all layers"]
    above = bool(whole["above"].all())
    observed_range = f"{whole['specialization_nats'].min():.3g}..{whole['specialization_nats'].max():.3g}"
    verdict = (
        f"specialization {observed_range} nats over {len(whole)} seeds: {'above' if above else 'not above'} "
        f"the shuffled baseline (mean {whole['shuffled_mean_nats'].mean():.3g}, "
        f"{interval:.0%} interval up to {whole['shuffled_high_nats'].max():.3g})"
    )
    return SpecializationReport(frame=frame, above=above, verdict=verdict)


def shuffled_specialization(routing: DocumentRouting, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """`specialization` under `permutations` random assignments of the labels to the documents, [permutations, L]."""
    names, label_of_document, documents = np.unique(np.array(routing.labels), return_inverse=True, return_counts=True)
    if documents.min() < 2:
        raise ValueError(f"corpus '{names[documents.argmin()]}' has 1 document: shuffling needs at least 2 of each")
    shuffled = rng.permuted(np.tile(label_of_document, (permutations, 1)), axis=1)
    belongs = shuffled[:, None, :] == np.arange(len(names))[None, :, None]
    return divergence(
        np.einsum("pcd,dle->pcle", belongs.astype(np.float64), checked_counts(routing.load), optimize=True)
    )
