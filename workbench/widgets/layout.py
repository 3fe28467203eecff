"""Heights, margins and label places in CSS pixels, the same for the canvas, the plotly figure and the SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from workbench.widgets.axes import Axis, spread, whole_ticks
from workbench.widgets.primitives import Bars, Heatmap, Lines, Primitive

# Above the plot stands the name of the vertical axis, below it the ticks and the name of the horizontal one.
TOP = 24
BOTTOM = 42
CHANGE_ROW = 16
LABEL_GAP = 15
# Two lines above everything in a static picture: what it shows and how far it was.
HEADING = 52


@dataclass(frozen=True)
class EndLabel:
    """A name beside the right end of a line: `anchor` is where the line ends, `at` where the name fits (0..1)."""

    text: str
    color: int | None
    anchor: float
    at: float


def top_margin(primitive: Primitive) -> int:
    changes = isinstance(primitive, Lines) and any(marker.kind == "change" for marker in primitive.markers)
    return TOP + (CHANGE_ROW if changes else 0)


def plot_height(primitive: Primitive) -> int:
    """Height of the plotting area alone; of a table, of all its rows."""
    if isinstance(primitive, Lines):
        return 240 if primitive.span > 6 else 190
    if isinstance(primitive, Heatmap | Bars):
        rows = len(primitive.row_names) if isinstance(primitive, Heatmap) else len(primitive.names)
        # Equal rows in both, so that bars stand beside the rows of the heatmap they belong to.
        return max(90, rows * row_height(rows))
    return 30 * (1 + len(primitive.rows))


def row_height(rows: int) -> int:
    return int(min(34, max(10, 340 // max(rows, 1))))


def labelled_rows(rows: int) -> tuple[int, ...]:
    """The rows whose names and values have room for words."""
    return tuple(range(rows)) if row_height(rows) >= 14 else whole_ticks(rows, 20)


def height(primitive: Primitive) -> int:
    return top_margin(primitive) + plot_height(primitive) + BOTTOM


def short(words: str, at_most: int = 22) -> str:
    """Words that fit beside a plot; the whole of them stays in tooltips and tables."""
    return words if len(words) <= at_most else words[: at_most - 1] + "…"


def end_labels(primitive: Lines, axis: Axis) -> list[EndLabel]:
    """Names of the lines that are not faint and of the references, moved apart where they would overlap."""
    found: list[tuple[str, int | None, float]] = []
    for line in primitive.lines:
        shown = line.y[np.isfinite(line.y) & ((line.y > 0) | (axis.scale == "linear"))]
        if not line.faint and shown.size:
            found.append((line.label or line.name, line.color, axis.fraction(float(shown[-1]))))
    for reference in primitive.references:
        if math.isfinite(reference.y) and (reference.y > 0 or axis.scale == "linear"):
            found.append((reference.name, None, axis.fraction(reference.y)))
    places = spread([anchor for _, _, anchor in found], LABEL_GAP / plot_height(primitive), 0.0, 1.0)
    return [EndLabel(short(text), color, anchor, at) for (text, color, anchor), at in zip(found, places, strict=True)]
