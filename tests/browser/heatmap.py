"""What the heatmap on the screen must be, given a recorded load."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.widgets.colors import color_table


def check_heatmap(found: dict[str, Any], load_LE: np.ndarray) -> None:
    """`found`, from `Lab.heatmap`, holds the numbers of this load and shows their colours."""
    relative_LE = load_LE / load_LE.mean(1, keepdims=True)
    assert (found["rows"], found["columns"]) == load_LE.shape
    assert found["detail"] == load_LE.ravel().tolist()
    np.testing.assert_allclose(found["values"], relative_LE.ravel(), rtol=1e-6)
    table = np.frombuffer(color_table(), np.uint8).reshape(256, 3)
    # JavaScript rounds halves upwards.
    index = np.floor(255 * np.clip(np.asarray(found["values"]) / 2, 0, 1) + 0.5).astype(int)
    assert found["rgb"] == table[index].tolist()
