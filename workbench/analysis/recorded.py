"""Routing figures of a run folder, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from workbench.analysis.routing import dead_experts, max_violation, normalized_entropy
from workbench.record import Tail, loads_between


def balance_history(folder: str | Path, *, first: int = 1, last: int | None = None, every: int = 1) -> pd.DataFrame:
    """One row per recorded step and layer: MaxVio of that step's batch, normalised entropy, number of dead experts.

    Raises:
        ValueError: not a run folder, `every` is below 1, or a file of the run is lost.
    """
    layer_names = Tail(folder).snapshot().layer_names
    recorded = loads_between(folder, first, last, every)
    return pd.DataFrame(
        {
            "step": np.repeat(recorded.steps, len(layer_names)),
            "layer": np.tile(np.array(layer_names, dtype=object), len(recorded.steps)),
            "max_violation": max_violation(recorded.load_WLE).ravel(),
            "normalized_entropy": normalized_entropy(recorded.load_WLE).ravel(),
            "dead_experts": dead_experts(recorded.load_WLE).sum(-1).ravel(),
        }
    )
