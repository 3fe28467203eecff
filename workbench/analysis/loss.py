"""Loss curves: smoothing, spikes, and how far a model is below what counting alone achieves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def smooth(values: np.ndarray, steps: float = 50.0) -> np.ndarray:
    """Exponential mean with a memory of `steps` values, corrected for its start: the first value stays what it is.

    The newest value weighs 1 / steps once many have been seen; `steps=1` changes nothing.

    Raises:
        ValueError: `steps` is below 1, or `values` is not one axis of finite numbers.

    Source: the bias correction of Adam, arXiv 1412.6980, section 3.
    """
    if not 1 <= steps < float("inf"):
        raise ValueError(f"steps={steps} must be a finite number, at least 1")
    return pd.Series(checked_series(values)).ewm(alpha=1.0 / steps, adjust=True).mean().to_numpy()


def spike_thresholds(
    values: np.ndarray, *, window: int = 50, factor: float = 6.0, minimum_scale_nats: float = 0.02
) -> np.ndarray:
    """The value above which each entry is a spike; NaN while fewer than half a window came before it.

    It is median + factor x max(1.4826 x MAD, minimum_scale_nats) of the `window` values strictly before the entry,
    earlier spikes among them. MAD is the median distance from the median; 1.4826 makes it the standard deviation of
    normal values. The minimal scale keeps a flat curve from calling its noise a spike. `train` applies the same rule
    while it runs.

    Raises:
        ValueError: `window` is below 2, `factor` or `minimum_scale_nats` not above 0, or `values` not one axis of
            finite numbers.

    Source: Rousseeuw and Croux, JASA 88 (1993), 1273-1283.
    """
    if window < 2:
        raise ValueError(f"window={window} must be at least 2")
    if not factor > 0 or not minimum_scale_nats > 0:
        raise ValueError(f"factor={factor} and minimum_scale_nats={minimum_scale_nats} must be above 0")
    values = checked_series(values)
    thresholds = np.full(len(values), np.nan)
    seen_enough = window // 2
    if len(values) <= seen_enough:
        return thresholds
    # Row i holds the `window` values before entry i, padded with NaN where the series had not begun.
    padded = np.concatenate([np.full(window, np.nan), values[:-1]])
    before = np.lib.stride_tricks.sliding_window_view(padded, window)[seen_enough:]
    median = np.nanmedian(before, axis=1)
    scale = 1.4826 * np.nanmedian(np.abs(before - median[:, None]), axis=1)
    thresholds[seen_enough:] = median + factor * np.maximum(scale, minimum_scale_nats)
    return thresholds


def spikes(
    values: np.ndarray, *, window: int = 50, factor: float = 6.0, minimum_scale_nats: float = 0.02
) -> np.ndarray:
    """True where a value exceeds its `spike_thresholds`; never in the first half window."""
    thresholds = spike_thresholds(values, window=window, factor=factor, minimum_scale_nats=minimum_scale_nats)
    return np.asarray(values, dtype=np.float64) > thresholds


def floors(nats_per_byte: float, floors_nats_per_byte: Mapping[str, float]) -> pd.DataFrame:
    """One row per counting model, the highest floor first: `floor_nats_per_byte` and the `margin_nats` below it.

    Both arguments are fields of an `Evaluation`. A negative margin: the model predicts worse than that counting.
    """
    ordered = sorted(floors_nats_per_byte.items(), key=lambda item: -item[1])
    return pd.DataFrame(
        {
            "floor": [name for name, _ in ordered],
            "floor_nats_per_byte": [value for _, value in ordered],
            "margin_nats": [value - nats_per_byte for _, value in ordered],
        }
    )


def checked_series(values: np.ndarray) -> np.ndarray:
    """`values` as float64.

    Raises:
        ValueError: not one axis of finite numbers.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values of shape {values.shape} must have one axis")
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"values[{first}]={values[first]} must be finite")
    return values
