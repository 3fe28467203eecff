"""Colours that stay apart for every kind of colour vision, on a light and on a dark ground."""

from __future__ import annotations

import matplotlib

# Okabe and Ito, "Color Universal Design" (2008), without black and yellow, which vanish on one of the two grounds.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

COLOR_MAP = "cividis"


def line_color(index: int) -> str:
    """The colour of the `index`-th series; they repeat after the last."""
    return LINE_COLORS[index % len(LINE_COLORS)]


def color_table() -> bytes:
    """256 RGB triples of the perceptually uniform map that every heatmap uses, dark (low) to light (high)."""
    return (matplotlib.colormaps[COLOR_MAP](range(256))[:, :3] * 255).round().astype("uint8").tobytes()
