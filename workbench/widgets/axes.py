"""Axes: range, ticks and their labels, computed once for the three renderers so that they agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Scale = Literal["linear", "log2", "log10"]
Unit = Literal["number", "bytes", "context"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A fitted axis. `low` and `high` are in data units, also on a logarithmic scale."""

    label: str
    scale: Scale
    low: float
    high: float
    ticks: tuple[float, ...]
    tick_labels: tuple[str, ...]

    def fraction(self, value: float) -> float:
        """Where `value` lies between `low` (0) and `high` (1)."""
        if self.scale == "linear":
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)


def fit(
    arrays: Iterable[np.ndarray | Sequence[float]], *, label: str, scale: Scale, unit: Unit = "number", tight: bool
) -> Axis:
    """An axis that holds all finite values; `tight` ends at the data, otherwise 4 % of air is left at both ends."""
    values = np.concatenate([np.empty(0), *(np.asarray(array, dtype=np.float64).ravel() for array in arrays)])
    values = values[np.isfinite(values) & ((values > 0) | (scale == "linear"))]
    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 2.0)
    if scale == "linear":
        low, high = (low, high) if high > low else (low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0))
        air = 0.0 if tight else 0.04 * (high - low)
        # Quantities that are never negative keep their zero line instead of a gap below it.
        low = 0.0 if low >= 0 and low - air < 0.1 * high else low - air
        high += air
        # Whole KiB, MiB or GiB: multiples of 1024, not of 1000.
        step = 1024.0 ** int(math.log(max(high, 1.0), 1024)) if unit == "bytes" else 1.0
        ticks = tuple(tick * step for tick in linear_ticks(low / step, high / step))
    else:
        base = 2.0 if scale == "log2" else 10.0
        low, high = (low, high) if high > low else (low / base, high * base)
        air = 1.0 if tight else (high / low) ** 0.04
        low, high = low / air, high * air
        ticks = log_ticks(low, high, base)
    return Axis(
        label=label, scale=scale, low=low, high=high, ticks=ticks, tick_labels=tuple(number(t, unit) for t in ticks)
    )


def linear_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About `count` multiples of 1, 2 or 5 times a power of ten between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    while (high - low) / step > count * 1.3:
        # 1, 2, 5, 10, 20, ...: the leading digit 2 is the only one that grows by 2.5.
        step *= 2.5 if f"{step:e}".startswith("2") else 2.0
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{index * step:.10g}") for index in range(first, last + 1))


def log_ticks(low: float, high: float, base: float) -> tuple[float, ...]:
    """At most 8 powers of `base`; below one decade, 1-2-5 steps or, when even these are too few, linear ticks."""
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    powers = range(first, last + 1)
    if base == 10.0 and len(powers) < 3:
        fine = [d * 10.0**p for p in range(first - 1, last + 1) for d in (1, 2, 5)]
        inside = tuple(t for t in fine if low <= t * (1 + 1e-9) and t <= high * (1 + 1e-9))
        return inside if len(inside) >= 3 else tuple(t for t in linear_ticks(low, high, 4) if t > 0)
    stride = -(-len(powers) // 8) or 1
    return tuple(base**p for p in powers if p % stride == 0)


def number(value: float, unit: Unit = "number", digits: int = 4) -> str:
    """A value as a reader wants it: `0.5`, `12k`, `3e-4`, `64 MiB`, `128k` (context, k = 1024)."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if unit == "bytes":
        for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
            if abs(value) >= 1024**power:
                return f"{value / 1024**power:.3g} {name}"
        return f"{value:.4g} B"
    if unit == "context":
        return f"{value / 1024:.4g}k" if value >= 1024 else f"{value:.4g}"
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        for power, name in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
            if abs(value) >= 10**power:
                return f"{value / 10**power:.{digits}g}{name}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def whole_ticks(count: int, at_most: int) -> tuple[int, ...]:
    """0, s, 2s, ... below `count` with the smallest s of 1, 2, 4, 8, ... that needs at most `at_most` ticks."""
    stride = 1
    while -(-count // stride) > at_most:
        stride *= 2
    return tuple(range(0, count, stride))


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as a sweep can, so that neighbours are `gap` apart and all lie in low..high.

    With more labels than room the gap shrinks to what fits.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed[-1] = min(placed[-1], high)
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(positions)
    for slot, i in enumerate(order):
        result[i] = placed[slot]
    return result
