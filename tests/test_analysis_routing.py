"""Routing figures: hand-computed cases, laws, and refused input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from workbench.analysis import (
    coactivation,
    dead_experts,
    entropy,
    expected_coactivation,
    load_fractions,
    max_violation,
    max_violation_global,
    normalized_entropy,
)

LOAD_LE = np.array([[2, 2, 4, 0], [3, 3, 3, 3], [0, 8, 0, 0]])
some_loads = arrays(np.int64, (2, 5), elements=st.integers(0, 50)).filter(lambda load: bool((load.sum(1) > 0).all()))


def test_figures_of_three_hand_computed_layers():
    np.testing.assert_allclose(load_fractions(LOAD_LE)[0], [0.25, 0.25, 0.5, 0.0])
    np.testing.assert_allclose(max_violation(LOAD_LE), [1.0, 0.0, 3.0])
    np.testing.assert_allclose(entropy(LOAD_LE), [1.5 * np.log(2), np.log(4), 0.0], atol=1e-15)
    np.testing.assert_allclose(normalized_entropy(LOAD_LE), [0.75, 1.0, 0.0], atol=1e-15)
    np.testing.assert_array_equal(dead_experts(LOAD_LE)[0], [False, False, False, True])


def test_dead_is_below_the_given_share_of_the_mean():
    load_LE = np.array([[1, 99, 100, 200]])  # the mean is 100
    assert not dead_experts(load_LE, below=0.01).any()
    np.testing.assert_array_equal(dead_experts(load_LE, below=0.011), [[True, False, False, False]])
    np.testing.assert_array_equal(dead_experts(load_LE, below=1.0), [[True, True, False, False]])


def test_imbalance_that_alternates_is_seen_per_batch_and_cancels_globally():
    loads = np.array([[[4, 0]], [[0, 4]]])
    np.testing.assert_array_equal(max_violation(loads), [[1.0], [1.0]])
    np.testing.assert_array_equal(max_violation_global(loads), [0.0])


@given(some_loads)
def test_laws_of_any_load(load_LE):
    num_experts = load_LE.shape[1]
    np.testing.assert_allclose(load_fractions(load_LE).sum(1), 1.0)
    assert np.all((max_violation(load_LE) >= 0) & (max_violation(load_LE) <= num_experts - 1 + 1e-12))
    assert np.all((entropy(load_LE) >= -1e-12) & (entropy(load_LE) <= np.log(num_experts) + 1e-12))
    np.testing.assert_allclose(max_violation(load_LE * 7), max_violation(load_LE))
    np.testing.assert_allclose(entropy(load_LE[:, ::-1]), entropy(load_LE))


def test_layer_without_tokens_has_no_figures_and_a_model_without_experts_no_layers():
    nothing_LE = np.zeros((1, 4))
    assert np.isnan(max_violation(nothing_LE)).all()
    assert np.isnan(entropy(nothing_LE)).all()
    assert not dead_experts(nothing_LE).any()
    assert max_violation(np.zeros((0, 0))).shape == (0,)
    assert entropy(np.zeros((0, 0))).shape == (0,)
    np.testing.assert_array_equal(normalized_entropy(np.array([[5]])), [1.0])


def test_coactivation_counts_pairs():
    indices_NA = np.array([[0, 1], [1, 0], [2, 0], [2, 3]])
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 1] = expected[1, 0] = 2
    expected[0, 2] = expected[2, 0] = 1
    expected[2, 3] = expected[3, 2] = 1
    np.testing.assert_array_equal(coactivation(indices_NA, 4), expected)


def test_coactivation_laws():
    rng = np.random.default_rng(0)
    indices_NA = np.argsort(rng.random((300, 6)), axis=1)[:, :3]
    pairs_EE = coactivation(indices_NA, 6)
    load_E = np.bincount(indices_NA.ravel(), minlength=6)
    np.testing.assert_array_equal(pairs_EE, pairs_EE.T)
    np.testing.assert_array_equal(np.diag(pairs_EE), 0)
    np.testing.assert_array_equal(pairs_EE.sum(1), load_E * 2)  # A - 1 partners per choice
    expected_EE = expected_coactivation(indices_NA, 6)
    np.testing.assert_allclose(expected_EE.sum(1), pairs_EE.sum(1))
    # Choices without preference: each count is Poisson-like around its expectation.
    off = ~np.eye(6, dtype=bool)
    assert np.all(np.abs(pairs_EE - expected_EE)[off] < 4 * np.sqrt(expected_EE[off]))


def test_expected_coactivation_of_equal_loads_is_equal_and_finds_the_preferred_pair():
    indices_NA = np.array([[0, 1]] * 6 + [[2, 3]] * 6)
    expected_EE = expected_coactivation(indices_NA, 4)
    np.testing.assert_allclose(expected_EE, 2.0 * (1 - np.eye(4)))
    assert coactivation(indices_NA, 4)[0, 1] == pytest.approx(3 * expected_EE[0, 1])


def test_one_choice_per_token_makes_no_pairs():
    np.testing.assert_array_equal(coactivation(np.array([[0], [1]]), 2), np.zeros((2, 2)))
    np.testing.assert_array_equal(expected_coactivation(np.array([[0], [1]]), 2), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: max_violation(np.array([1.0, 2.0])), "at least two axes"),
        (lambda: max_violation(np.array([[1.0, -2.0]])), "finite counts, 0 or more"),
        (lambda: entropy(np.array([[1.0, np.nan]])), "finite counts, 0 or more"),
        (lambda: max_violation_global(LOAD_LE), "must have three axes"),
        (lambda: dead_experts(LOAD_LE, below=0.0), "below=0.0 must lie above 0"),
        (lambda: coactivation(np.array([[0, 4]]), 4), r"indices 0..4 must lie in 0..3"),
        (lambda: coactivation(np.array([[0, 1], [2, 2]]), 4), r"token 1 chose \[2, 2\]"),
        (lambda: coactivation(np.array([[0.0, 1.0]]), 4), "must be whole numbers"),
        (lambda: coactivation(np.array([0, 1]), 4), "must be whole numbers"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, line):
    with pytest.raises(ValueError, match=line) as refusal:
        call()
    assert "\n" not in str(refusal.value)
