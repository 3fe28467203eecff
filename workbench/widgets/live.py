"""The live renderer: primitives as one JSON header and raw little-endian buffers for the canvas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.widgets.axes import Axis, whole_ticks
from workbench.widgets.colors import line_color
from workbench.widgets.layout import end_labels, height, labelled_rows, plot_height, short, top_margin
from workbench.widgets.primitives import Bars, Heatmap, Lines, Primitive, Table, thin

POINTS_PER_LINE = 1000


class Arrays:
    """The numbers of a frame: `types` is "f4" or "i4" for each of `buffers`."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.buffers: list[bytes] = []

    def add(self, values: np.ndarray, kind: str) -> int:
        """Append an array as little-endian `kind`; the answer is its index, which headers hold."""
        self.types.append(kind)
        self.buffers.append(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes())
        return len(self.buffers) - 1


def encode(primitives: Sequence[Primitive]) -> tuple[list[dict[str, Any]], Arrays]:
    """One header per primitive, and the arrays that they name by index.

    Lines longer than `POINTS_PER_LINE` are thinned to their extremes; heatmaps are sent whole.
    """
    arrays = Arrays()
    return [_header(primitive, arrays) for primitive in primitives], arrays


def _header(primitive: Primitive, arrays: Arrays) -> dict[str, Any]:
    common = {
        "title": primitive.title,
        "summary": primitive.summary,
        "span": primitive.span,
        "empty": primitive.empty,
        "top": top_margin(primitive),
        "plot": plot_height(primitive),
        "height": height(primitive),
    }
    if primitive.empty:
        return {"kind": "empty", **common}
    if isinstance(primitive, Lines):
        return common | _lines(primitive, arrays)
    if isinstance(primitive, Heatmap):
        return common | _heatmap(primitive, arrays)
    if isinstance(primitive, Bars):
        return common | _bars(primitive, arrays)
    return common | _table(primitive)


def _lines(primitive: Lines, arrays: Arrays) -> dict[str, Any]:
    y_axis = primitive.y_axis()
    lines = []
    for line in primitive.lines:
        x, y = thin(line.x, line.y, POINTS_PER_LINE)
        lines.append(
            {
                "name": line.name,
                "color": line_color(line.color),
                "faint": line.faint,
                "points": line.points,
                "x": arrays.add(x, "f4"),
                "y": arrays.add(y, "f4"),
            }
        )
    return {
        "kind": "lines",
        "x": _axis(primitive.x_axis()),
        "y": _axis(y_axis),
        "lines": lines,
        "references": [{"name": reference.name, "y": reference.y} for reference in primitive.references],
        "markers": [
            # JSON has no NaN: a marker without a height has none.
            {"x": m.x, "label": m.label, "kind": m.kind, "y": m.y if np.isfinite(m.y) else None}
            for m in primitive.markers
        ],
        "labels": [
            {
                "text": label.text,
                "color": None if label.color is None else line_color(label.color),
                "anchor": label.anchor,
                "at": label.at,
            }
            for label in end_labels(primitive, y_axis)
        ],
    }


def _heatmap(primitive: Heatmap, arrays: Arrays) -> dict[str, Any]:
    rows, columns = primitive.values_PQ.shape
    detail = primitive.detail_PQ
    return {
        "kind": "heatmap",
        "rows": rows,
        "columns": columns,
        "rowNames": list(primitive.row_names),
        "rowLabels": [short(name) for name in primitive.row_names],
        "columnName": primitive.column_name,
        "columnTicks": list(whole_ticks(columns, 16)),
        "rowTicks": list(labelled_rows(rows)),
        "xLabel": primitive.x_label,
        "yLabel": primitive.y_label,
        "zLabel": primitive.z_label,
        "low": primitive.low,
        "high": primitive.high,
        "zTicks": [[value, text] for value, text in primitive.z_ticks],
        "values": arrays.add(primitive.values_PQ, "f4"),
        "detail": None if detail is None else arrays.add(detail, "i4" if detail.dtype.kind in "iu" else "f4"),
        "detailLabel": primitive.detail_label,
        "marked": None if primitive.marked_PQ is None else arrays.add(primitive.marked_PQ, "i4"),
        "markLabel": primitive.mark_label,
    }


def _bars(primitive: Bars, arrays: Arrays) -> dict[str, Any]:
    return {
        "kind": "bars",
        "x": _axis(primitive.x_axis()),
        "yLabel": primitive.y_label,
        "names": list(primitive.names),
        "rowLabels": [short(name) for name in primitive.names],
        "labels": [short(text) for text in primitive.labels()],
        "rowTicks": list(labelled_rows(len(primitive.names))),
        "values": arrays.add(primitive.values, "f4"),
    }


def _table(primitive: Table) -> dict[str, Any]:
    return {"kind": "table", "columns": list(primitive.columns), "rows": primitive.cells()}


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "label": axis.label,
        "scale": axis.scale,
        "low": axis.low,
        "high": axis.high,
        "ticks": list(axis.ticks),
        "tickLabels": list(axis.tick_labels),
    }
