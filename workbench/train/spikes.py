"""Noticing a loss spike while it happens."""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 50
FACTOR = 6.0
MINIMUM_SCALE_NATS = 0.02


class SpikeDetector:
    """Compares each loss with the median of the losses before it, in units of their robust scale.

    A loss above median + FACTOR * max(1.4826 * MAD, MINIMUM_SCALE_NATS) of the previous WINDOW losses is a spike;
    nothing is one before half a window was seen. `analysis.loss.spikes` applies the same rule to a recorded curve.
    """

    def __init__(self, recent: list[float]) -> None:
        self.recent: deque[float] = deque(recent, maxlen=WINDOW)

    def threshold(self) -> float:
        """The loss above which the next one counts as a spike; infinite before half a window was seen."""
        if len(self.recent) < WINDOW // 2:
            return float("inf")
        losses = np.asarray(self.recent)
        median = float(np.median(losses))
        scale = 1.4826 * float(np.median(np.abs(losses - median)))
        return median + FACTOR * max(scale, MINIMUM_SCALE_NATS)

    def add(self, loss: float) -> None:
        """Count `loss` among the previous ones."""
        self.recent.append(loss)
