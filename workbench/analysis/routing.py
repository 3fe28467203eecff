"""How evenly tokens spread over experts, and which experts they choose together.

A load counts the tokens that chose each expert: `load_LE`, or any stack of such tables, for instance one per batch.
A layer that saw no token has no fractions: its figures are NaN, and none of its experts is called dead.
"""

from __future__ import annotations

import numpy as np


def load_fractions(load_LE: np.ndarray) -> np.ndarray:
    """Each expert's share of its layer's choices; every layer sums to 1."""
    counts_LE = checked_counts(load_LE)
    with np.errstate(invalid="ignore"):
        return counts_LE / counts_LE.sum(-1, keepdims=True)


def max_violation(load_LE: np.ndarray) -> np.ndarray:
    """MaxVio per layer, (largest load - mean load) / mean load: 0 in perfect balance, E - 1 with all tokens on one.

    Given one load per batch, [batches, L, E], it is MaxVio per batch, [batches, L].

    Source: Wang et al., arXiv 2408.15664, section 4.1.
    """
    fractions_LE = load_fractions(load_LE)
    # `initial` lets a model without experts (zero layers of zero experts) pass; fractions are never negative.
    return fractions_LE.max(-1, initial=0.0) * fractions_LE.shape[-1] - 1.0


def max_violation_global(loads_LE: np.ndarray) -> np.ndarray:
    """MaxVio per layer of the loads summed over the first axis, [batches, L, E] -> [L].

    Imbalances that alternate from batch to batch cancel here and do not in `max_violation`.
    """
    if np.ndim(loads_LE) != 3:
        raise ValueError(f"loads of shape {np.shape(loads_LE)} must have three axes: batches, layers, experts")
    return max_violation(checked_counts(loads_LE).sum(0))


def entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of the load fractions per layer, in nats: 0 with all tokens on one expert, ln E in perfect balance."""
    fractions_LE = load_fractions(load_LE)
    return -np.sum(fractions_LE * np.log(np.where(fractions_LE > 0, fractions_LE, 1.0)), axis=-1)


def normalized_entropy(load_LE: np.ndarray) -> np.ndarray:
    """`entropy` over its largest possible value, ln E; a single expert counts as balanced."""
    nats_L = entropy(load_LE)
    num_experts = np.shape(load_LE)[-1]
    return nats_L / np.log(num_experts) if num_experts > 1 else nats_L + 1.0


def dead_experts(load_LE: np.ndarray, below: float = 0.01) -> np.ndarray:
    """True where an expert's load is under `below` of its layer's mean load.

    Raises:
        ValueError: `below` is not between 0 and 1.
    """
    if not 0 < below <= 1:
        raise ValueError(f"below={below} must lie above 0 and at most at 1 (the mean load)")
    fractions_LE = load_fractions(load_LE)
    return fractions_LE * fractions_LE.shape[-1] < below


def coactivation(indices_NA: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, E] counts of the tokens that chose both experts; symmetric, with a zero diagonal.

    Raises:
        ValueError: `indices_NA` is not one row of distinct experts below `num_experts` per token.
    """
    indices_NA = checked_choices(indices_NA, num_experts)
    active = indices_NA.shape[1]
    pairs = np.zeros(num_experts * num_experts, dtype=np.int64)
    for first in range(active):
        for second in range(first + 1, active):
            codes_N = indices_NA[:, first] * num_experts + indices_NA[:, second]
            pairs += np.bincount(codes_N, minlength=pairs.size)
    pairs_EE = pairs.reshape(num_experts, num_experts)
    return pairs_EE + pairs_EE.T


def expected_coactivation(indices_NA: np.ndarray, num_experts: int, *, sweeps: int = 200) -> np.ndarray:
    """[E, E] counts that the loads alone explain: a token's experts know nothing of each other, but are distinct.

    Entry (i, j) is s_i s_j off the diagonal, with s such that each row sums to load_i (A - 1), as the observed rows do.
    The plain product of the marginals would count pairs of an expert with itself, and so call every pair too rare.
    s is found by `sweeps` rounds of iterative proportional fitting.

    Source: quasi-independence, Goodman, JASA 63 (1968), 1091-1131.
    """
    observed_rows_E = coactivation(indices_NA, num_experts).sum(1).astype(np.float64)
    total = observed_rows_E.sum()
    if total == 0:
        return np.zeros((num_experts, num_experts))
    scale_E = observed_rows_E / np.sqrt(total)
    for _ in range(sweeps):
        others_E = scale_E.sum() - scale_E
        fitted_E = np.divide(observed_rows_E, others_E, out=np.zeros_like(scale_E), where=others_E > 0)
        # The geometric mean of old and new: all rows move at once, and without it two experts would swap for ever.
        scale_E = np.sqrt(scale_E * fitted_E)
    expected_EE = np.outer(scale_E, scale_E)
    np.fill_diagonal(expected_EE, 0.0)
    return expected_EE


def checked_counts(load: np.ndarray) -> np.ndarray:
    """`load` as float64.

    Raises:
        ValueError: no axis of layers, or an entry is negative or not finite.
    """
    counts = np.asarray(load, dtype=np.float64)
    if counts.ndim < 2:
        raise ValueError(f"a load of shape {counts.shape} must have at least two axes: layers, experts")
    if not np.all(np.isfinite(counts) & (counts >= 0)):
        raise ValueError("a load must hold finite counts, 0 or more")
    return counts


def checked_choices(indices_NA: np.ndarray, num_experts: int) -> np.ndarray:
    """`indices_NA` as int64.

    Raises:
        ValueError: not whole numbers of shape [N, A], out of 0..num_experts-1, or an expert twice in one row.
    """
    indices_NA = np.asarray(indices_NA)
    if indices_NA.ndim != 2 or not np.issubdtype(indices_NA.dtype, np.integer):
        raise ValueError(
            f"indices of shape {indices_NA.shape} and type {indices_NA.dtype} must be whole numbers, [tokens, choices]"
        )
    if indices_NA.size and not 0 <= indices_NA.min() <= indices_NA.max() < num_experts:
        raise ValueError(
            f"indices {indices_NA.min()}..{indices_NA.max()} must lie in 0..{num_experts - 1} "
            f"(num_experts={num_experts})"
        )
    ordered_NA = np.sort(indices_NA.astype(np.int64), axis=1)
    if np.any(ordered_NA[:, 1:] == ordered_NA[:, :-1]):
        token = int(np.argmax(np.any(ordered_NA[:, 1:] == ordered_NA[:, :-1], axis=1)))
        raise ValueError(f"token {token} chose {indices_NA[token].tolist()}: its experts must be distinct")
    return ordered_NA
