"""Specialization: hand-computed divergences, and a baseline that tells preference from chance."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.analysis import DocumentRouting, specialization, specialization_report


def routing(seed: int, *, preference: float, documents: int = 20) -> DocumentRouting:
    """Two corpora whose documents lean to their half of 4 experts by `preference`, and have tastes of their own."""
    rng = np.random.default_rng(seed)
    labels = ("code",) * documents + ("prose",) * documents
    load = np.zeros((2 * documents, 2, 4), dtype=np.int64)
    for document, label in enumerate(labels):
        lean = np.array([preference, preference, 0, 0] if label == "code" else [0, 0, preference, preference])
        for layer in range(2):
            taste = rng.dirichlet(np.full(4, 2.0))
            load[document, layer] = rng.multinomial(200, (taste + lean) / (taste + lean).sum())
    return DocumentRouting(layer_names=("layer 0", "layer 1"), labels=labels, load=load, indices={})


def test_divergence_of_hand_computed_corpora():
    alike = specialization({"code": np.array([[3, 1]]), "prose": np.array([[300, 100]])})
    np.testing.assert_allclose(alike, [0.0], atol=1e-15)
    apart = specialization({"code": np.array([[5, 0, 0]]), "prose": np.array([[0, 1, 1]])})
    np.testing.assert_allclose(apart, [np.log(2)])
    half = specialization({"code": np.array([[2, 2]]), "prose": np.array([[4, 0]])})
    # Mixture 3/4, 1/4; entropies 0.5623, ln 2 and 0.
    mixture = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(half, [mixture - np.log(2) / 2])


def test_three_corpora_apart_reach_ln_3():
    np.testing.assert_allclose(specialization({n: np.eye(3)[[i]] for i, n in enumerate("abc")}), [np.log(3)])


def test_preference_is_above_the_baseline_and_taste_of_single_documents_is_not():
    leaning = specialization_report({seed: routing(seed, preference=0.5) for seed in range(3)})
    assert leaning.above
    assert "above the shuffled baseline" in leaning.verdict
    assert "not above" not in leaning.verdict
    tasting = specialization_report({seed: routing(seed, preference=0.0) for seed in range(3)})
    assert not tasting.above
    assert "not above the shuffled baseline" in tasting.verdict


def test_report_has_a_row_per_seed_and_layer_that_agrees_with_specialization():
    routings = {seed: routing(seed, preference=0.2) for seed in (4, 5, 6)}
    frame = specialization_report(routings).frame
    assert len(frame) == 3 * 3
    one = frame[(frame["seed"] == 5) & (frame["layer"] == "layer 1")].iloc[0]
    assert one["specialization_nats"] == pytest.approx(specialization(routings[5].by_corpus())[1])
    assert one["shuffled_low_nats"] <= one["shuffled_mean_nats"] <= one["shuffled_high_nats"]
    assert one["above"] == (one["specialization_nats"] > one["shuffled_high_nats"])


def test_same_report_twice():
    routings = {seed: routing(seed, preference=0.2) for seed in range(3)}
    first, second = specialization_report(routings).frame, specialization_report(routings).frame
    assert first.equals(second)


def test_verdict_asks_every_seed():
    mixed = {0: routing(0, preference=0.5), 1: routing(1, preference=0.5), 2: routing(2, preference=0.0)}
    assert not specialization_report(mixed).above


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: specialization({"code": np.ones((1, 2))}), "two or more corpora"),
        (lambda: specialization({"a": np.ones((1, 2)), "b": np.ones((1, 3))}), "same shape"),
        (lambda: specialization_report({0: routing(0, preference=1.0)}), "1 seeds were given"),
        (
            lambda: specialization_report({s: routing(s, preference=1.0, documents=1) for s in range(3)}),
            "'code' has 1 document",
        ),
        (
            lambda: specialization_report({s: routing(s, preference=1.0) for s in range(3)}, permutations=10),
            "permutations=10",
        ),
        (
            lambda: DocumentRouting(layer_names=("layer 0",), labels=("a",), load=np.zeros((2, 1, 4)), indices={}),
            "1 labels",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, line):
    with pytest.raises(ValueError, match=line) as refusal:
        call()
    assert "\n" not in str(refusal.value)
