"""Loss curves: smoothing, spikes, floors."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.analysis import floors, smooth, spike_thresholds, spikes


def test_smoothing_by_hand_and_without_bias_at_the_start():
    # Memory of 2: weights 1/2, 1/4, ... over what was seen, normalised.
    np.testing.assert_allclose(smooth(np.array([4.0, 1.0, 1.0]), 2), [4.0, (2 * 1 + 4) / 3, (4 * 1 + 2 * 1 + 4) / 7])
    np.testing.assert_allclose(smooth(np.full(20, 3.5), 10), 3.5)
    series = np.array([1.0, 5.0, 2.0])
    np.testing.assert_array_equal(smooth(series, 1), series)
    assert smooth(np.array([])).shape == (0,)


def test_threshold_by_hand():
    # The four before the last: median 2.5, distances 1.5 .5 .5 1.5, MAD 1.
    thresholds = spike_thresholds(np.array([9.0, 1.0, 2.0, 3.0, 4.0, 0.0]), window=4, factor=2.0)
    assert np.isnan(thresholds[:2]).all()
    assert thresholds[5] == pytest.approx(2.5 + 2.0 * 1.4826)
    # Half a window is enough: entry 2 is judged by 9 and 1.
    assert thresholds[2] == pytest.approx(5.0 + 2.0 * 1.4826 * 4.0)


def test_a_spike_is_found_where_it_is_and_only_there():
    rng = np.random.default_rng(0)
    values = 3.0 * np.exp(-np.arange(300) / 100) + 2.0 + 0.02 * rng.standard_normal(300)
    assert not spikes(values).any()
    values[200] += 1.0
    np.testing.assert_array_equal(np.flatnonzero(spikes(values)), [200])


def test_minimal_scale_keeps_a_flat_curve_quiet():
    values = np.full(100, 2.0)
    values[60] += 0.11
    assert not spikes(values).any()
    values[60] += 0.02
    np.testing.assert_array_equal(np.flatnonzero(spikes(values)), [60])


def test_nothing_is_a_spike_before_half_a_window():
    values = np.full(40, 2.0)
    values[24] = 50.0
    assert not spikes(values).any()
    values[25] = 100.0
    np.testing.assert_array_equal(np.flatnonzero(spikes(values)), [25])
    assert not spikes(values[:25]).any()


def test_the_online_detector_of_training_agrees_on_every_value():
    from workbench.train.spikes import SpikeDetector

    rng = np.random.default_rng(1)
    values = 2.0 + 0.05 * rng.standard_cauchy(400)
    detector = SpikeDetector([])
    thresholds = []
    for value in values:
        thresholds.append(detector.threshold())
        detector.add(float(value))
    ours = spike_thresholds(values)
    assert spikes(values).any()
    np.testing.assert_array_equal(np.isinf(thresholds), np.isnan(ours))
    np.testing.assert_allclose(ours[25:], thresholds[25:], rtol=1e-12)


def test_floors_are_ordered_and_margins_positive_when_the_model_is_better():
    table = floors(2.0, {"bigram": 2.4, "uniform": 5.5, "unigram": 3.2})
    assert list(table["floor"]) == ["uniform", "unigram", "bigram"]
    np.testing.assert_allclose(table["margin_nats"], [3.5, 1.2, 0.4])


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: smooth(np.ones(3), 0.5), "steps=0.5"),
        (lambda: smooth(np.ones((2, 2))), "must have one axis"),
        (lambda: smooth(np.array([1.0, np.nan])), r"values\[1\]=nan must be finite"),
        (lambda: spikes(np.ones(9), window=1), "window=1"),
        (lambda: spikes(np.ones(9), factor=0.0), "factor=0.0"),
        (lambda: spikes(np.array([1.0, np.inf])), r"values\[1\]=inf must be finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, line):
    with pytest.raises(ValueError, match=line) as refusal:
        call()
    assert "\n" not in str(refusal.value)
