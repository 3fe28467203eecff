"""Axes hold their data, ticks are round, labels do not overlap, and thinning loses no extreme."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.widgets.axes import fit, linear_ticks, log_ticks, number, spread, whole_ticks
from workbench.widgets.primitives import thin

numbers = st.floats(-1e9, 1e9, allow_nan=False)


@given(low=numbers, width=st.floats(1e-3, 1e9))
def test_linear_ticks_lie_inside_and_are_equally_far_apart(low: float, width: float) -> None:
    high = low + width
    if not high - low > 1e-6 * max(abs(low), abs(high)):
        return
    ticks = linear_ticks(low, high)
    slack = 1e-6 * (high - low) + 1e-9 * abs(low)
    assert 2 <= len(ticks) <= 8
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3)


def test_linear_ticks_are_multiples_of_one_two_or_five() -> None:
    assert linear_ticks(0, 1) == (0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert linear_ticks(1.7, 5.6) == (2, 3, 4, 5)
    assert linear_ticks(0, 600) == (0, 100, 200, 300, 400, 500, 600)


def test_logarithmic_ticks() -> None:
    assert log_ticks(1, 1000, 10.0) == (1, 10, 100, 1000)
    assert log_ticks(0.015, 5.5, 10.0) == (0.1, 1) or len(log_ticks(0.015, 5.5, 10.0)) >= 3
    assert log_ticks(1024, 131072, 2.0) == tuple(2.0**power for power in range(10, 18))
    assert len(log_ticks(1, 2.0**40, 2.0)) <= 8


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0.001, 0.4),
)
def test_spread_keeps_order_distance_and_bounds(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap, 0.0, 1.0)
    fitting = min(gap, 1.0 / max(len(positions) - 1, 1))
    ordered = sorted(placed)
    assert all(b - a >= fitting - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-9 and ordered[-1] <= 1 + 1e-9
    for i, first in enumerate(positions):
        assert all(placed[i] < placed[j] for j, second in enumerate(positions) if first < second)


def test_spread_leaves_what_does_not_collide() -> None:
    assert spread([0.9, 0.1, 0.5], 0.05, 0.0, 1.0) == [0.9, 0.1, 0.5]


def test_an_axis_holds_its_data_and_keeps_the_zero_line() -> None:
    axis = fit([np.array([0.1, 5.0, np.nan])], label="loss", scale="linear", tight=False)
    assert axis.low == 0.0 and axis.high > 5.0
    assert axis.fraction(axis.low) == 0.0 and axis.fraction(axis.high) == 1.0


def test_a_logarithmic_axis_ignores_what_has_no_logarithm() -> None:
    axis = fit([np.array([0.0, -1.0, 0.01, 10.0])], label="z", scale="log10", tight=True)
    assert (axis.low, axis.high) == (0.01, 10.0)
    assert math.isclose(axis.fraction(10**-0.5), 0.5)


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [math.nan], [-2.0, -2.0]])
@pytest.mark.parametrize("scale", ["linear", "log10", "log2"])
def test_an_axis_of_next_to_nothing_is_still_an_axis(values: list[float], scale) -> None:
    axis = fit([np.array(values)], label="x", scale=scale, tight=True)
    assert axis.high > axis.low and all(math.isfinite(tick) for tick in axis.ticks)


def test_byte_ticks_are_whole_units_of_1024() -> None:
    axis = fit([np.array([0.0, 12 * 1024.0])], label="bytes", scale="linear", unit="bytes", tight=True)
    assert axis.tick_labels == ("0 B", "2 KiB", "4 KiB", "6 KiB", "8 KiB", "10 KiB", "12 KiB")


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0, "number", "0"),
        (0.5, "number", "0.5"),
        (12_000, "number", "12k"),
        (0.0003, "number", "3e-4"),
        (64 * 1024**2, "bytes", "64 MiB"),
        (900, "bytes", "900 B"),
        (131072, "context", "128k"),
        (math.nan, "number", "–"),
        (-math.inf, "number", "−∞"),
    ],
)
def test_numbers_in_words(value: float, unit, words: str) -> None:
    assert number(value, unit) == words


def test_whole_ticks_never_exceed_their_count() -> None:
    assert whole_ticks(5, 16) == (0, 1, 2, 3, 4)
    assert whole_ticks(256, 16) == tuple(range(0, 256, 16))
    assert whole_ticks(0, 16) == ()


@given(st.integers(1, 5000), st.integers(0, 10_000))
def test_thinning_keeps_extremes_order_and_the_last_point(count: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=count)
    x = np.arange(count)
    few_x, few_y = thin(x, y, 200)
    assert len(few_x) <= max(200, 0) or count <= 200
    assert len(few_x) == count or len(few_x) <= 200
    assert {y.min(), y.max(), y[-1]} <= set(few_y)
    assert (np.diff(few_x) > 0).all() and (y[few_x] == few_y).all()


def test_thinning_leaves_short_series_alone() -> None:
    x, y = np.arange(200), np.arange(200.0)
    assert thin(x, y, 200)[0] is x
