"""The final renderer: one zoomable plotly figure, its panels below each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.widgets.axes import Axis, whole_ticks
from workbench.widgets.colors import line_color
from workbench.widgets.layout import BOTTOM, HEADING, end_labels, labelled_rows, plot_height, short, top_margin
from workbench.widgets.primitives import Bars, Heatmap, Lines, Primitive, Table, thin

TITLE = 28
POINTS_PER_LINE = 1000

INK = "#212121"
SOFT = "#616161"
GRID = "#e6e6e6"


def figure(primitives: Sequence[Primitive], title: str = "", status: str = "") -> go.Figure:
    """The panels share one column, so that every margin is exact in pixels at every width.

    All words are escaped: plotly reads markup in them. Lines are thinned to `POINTS_PER_LINE`, their extremes kept.
    """
    heights = [TITLE + top_margin(p) + plot_height(p) + BOTTOM for p in primitives]
    heading = HEADING if title else 0
    page = float(heading + max(sum(heights), 80))
    picture = go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": page,
            "margin": {
                "l": max((_left_margin(p) for p in primitives), default=10),
                "r": max((_right_margin(p) for p in primitives), default=10),
                "t": 0,
                "b": 0,
            },
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "showlegend": False,
            "hovermode": "closest",
            "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
        }
    )
    if title:
        top = _Panel(picture, 1, low=1 - heading / page, high=1.0)
        top.text(f"<b>{escape(title)}</b>", x=0, at=1, shift=(0, -16), size=17)
        top.text(escape(status), x=0, at=1, shift=(0, -38), color=SOFT)
    below = page - heading
    for index, (primitive, height) in enumerate(zip(primitives, heights, strict=True), start=1):
        high = below - TITLE - top_margin(primitive)
        _Panel(picture, index, low=(high - plot_height(primitive)) / page, high=high / page).draw(primitive)
        below -= height
    return picture


def _left_margin(primitive: Primitive) -> int:
    if isinstance(primitive, Heatmap | Bars) and not primitive.empty:
        names = primitive.row_names if isinstance(primitive, Heatmap) else primitive.names
        return 20 + _text_width([short(name) for name in names])
    if isinstance(primitive, Lines) and not primitive.empty:
        return 22 + _text_width(primitive.y_axis().tick_labels)
    return 16


def _right_margin(primitive: Primitive) -> int:
    if isinstance(primitive, Lines) and not primitive.empty:
        return 38 + _text_width([label.text for label in end_labels(primitive, primitive.y_axis())])
    if isinstance(primitive, Heatmap) and not primitive.empty:
        return 44 + _text_width([text for _, text in primitive.z_ticks])
    return 16


def _text_width(texts: Sequence[str]) -> int:
    # 6.8 pixels: a wide average letter of a 12 pixel face. The viewer's font is unknown.
    return round(6.8 * max((len(text) for text in texts), default=0))


class _Panel:
    """Draws one primitive between two heights of the page (0..1) on the axes with its number."""

    def __init__(self, picture: go.Figure, index: int, *, low: float, high: float) -> None:
        self.picture = picture
        self.low, self.high = low, high
        suffix = "" if index == 1 else str(index)
        self.x, self.y = f"x{suffix}", f"y{suffix}"
        self.x_key, self.y_key = f"xaxis{suffix}", f"yaxis{suffix}"

    def draw(self, primitive: Primitive) -> None:
        top = top_margin(primitive)
        self.text(f"<b>{escape(primitive.title)}</b>", x=0, at=1, shift=(0, top + 12), size=14)
        if primitive.empty:
            self.text(escape(primitive.summary), x=0, at=0.5, shift=(0, 0), color=SOFT)
            self._axes({"visible": False}, {"visible": False})
            return
        if isinstance(primitive, Table):
            self._table(primitive)
            return
        self.text(escape(primitive.y_label), x=0, at=1, shift=(0, top - 11), color=SOFT)
        if isinstance(primitive, Lines):
            self._lines(primitive)
        elif isinstance(primitive, Heatmap):
            self._heatmap(primitive)
        else:
            self._bars(primitive)

    def _lines(self, primitive: Lines) -> None:
        x_axis, y_axis = primitive.x_axis(), primitive.y_axis()
        self._axes(_axis(x_axis), _axis(y_axis) | {"title": None, "showgrid": True, "gridcolor": GRID})
        for reference in primitive.references:
            self.picture.add_shape(
                type="line",
                xref="paper",
                x0=0,
                x1=1,
                yref=self.y,
                y0=reference.y,
                y1=reference.y,
                line={"color": SOFT, "width": 1, "dash": "dash"},
            )
        for line in primitive.lines:
            x, y = thin(line.x, line.y, POINTS_PER_LINE)
            self._scatter(
                x,
                y,
                name=line.name,
                mode="lines+markers" if line.points else "lines",
                opacity=0.35 if line.faint else 1.0,
                line={"color": line_color(line.color), "width": 1 if line.faint else 2},
                marker={"size": 6},
                cliponaxis=not line.points,
                hover=f"{escape(line.name)}<br>{escape(primitive.x_label)} %{{x}}<br>%{{y:.5g}}",
            )
        spikes = [m for m in primitive.markers if m.kind == "spike" and np.isfinite(m.y)]
        if spikes:
            self._scatter(
                np.array([m.x for m in spikes]),
                np.array([m.y for m in spikes]),
                name="spikes",
                mode="markers",
                marker={"symbol": "triangle-down", "size": 9, "color": INK},
                text=[escape(m.label) for m in spikes],
                hover="%{text}",
            )
        self._changes([m for m in primitive.markers if m.kind == "change"], x_axis)
        for label in end_labels(primitive, y_axis):
            color = SOFT if label.color is None else line_color(label.color)
            dash = "╌" if label.color is None else "━"
            text = f'<span style="color:{color}">{dash}</span> {escape(label.text)}'
            self.text(text, x=1, at=label.at, shift=(6, 0))

    def _changes(self, changes: list[Any], x_axis: Axis) -> None:
        free_from = -1.0
        for marker in sorted(changes, key=lambda m: m.x):
            self.picture.add_shape(
                type="line",
                xref=self.x,
                x0=marker.x,
                x1=marker.x,
                yref="paper",
                y0=self.low,
                y1=self.high,
                line={"color": SOFT, "width": 1, "dash": "dot"},
            )
            at = x_axis.fraction(marker.x)
            if at >= free_from:
                self.text(escape(marker.label), x=at, at=1, shift=(0, 8), color=SOFT, size=11)
                # Of a plot that is 600 pixels wide.
                free_from = at + _text_width([marker.label]) / 600

    def _heatmap(self, primitive: Heatmap) -> None:
        rows, columns = primitive.values_PQ.shape
        ticks = labelled_rows(rows)
        bare = {"showline": False, "ticks": ""}
        self._axes(
            {
                "title": _axis_title(primitive.x_label),
                "tickvals": list(whole_ticks(columns, 16)),
                "range": [-0.5, columns - 0.5],
            }
            | bare,
            {
                "tickvals": list(ticks),
                "ticktext": [escape(short(primitive.row_names[i])) for i in ticks],
                "range": [rows - 0.5, -0.5],
            }
            | bare,
        )
        words = [[self._cell_words(primitive, row, column) for column in range(columns)] for row in range(rows)]
        gap = 1 if rows * columns <= 2048 else 0
        self.picture.add_trace(
            {
                "type": "heatmap",
                "z": _listed(primitive.values_PQ),
                "xaxis": self.x,
                "yaxis": self.y,
                "zmin": primitive.low,
                "zmax": primitive.high,
                "colorscale": "Cividis",
                "xgap": gap,
                "ygap": gap,
                "text": words,
                "hovertemplate": "%{text}<extra></extra>",
                "colorbar": {
                    "thickness": 10,
                    "outlinewidth": 0,
                    "x": 1.0,
                    "xpad": 12,
                    "ypad": 0,
                    "y": (self.low + self.high) / 2,
                    "len": self.high - self.low,
                    "tickvals": [value for value, _ in primitive.z_ticks],
                    "ticktext": [escape(text) for _, text in primitive.z_ticks],
                    "tickfont": {"color": SOFT},
                },
            }
        )
        # Its right end above that of the colour bar: the margin has room for the bar's words alone.
        self.text(escape(primitive.z_label), x=1, at=1, shift=(22, 13), color=SOFT, anchor="right")
        if primitive.marked_PQ is not None and primitive.marked_PQ.any():
            marked_rows, marked_columns = np.nonzero(primitive.marked_PQ)
            self._scatter(
                marked_columns,
                marked_rows,
                name=primitive.mark_label,
                mode="markers",
                marker={"symbol": "x-thin", "size": 7, "line": {"color": "white", "width": 1}},
                hoverinfo="skip",
            )

    @staticmethod
    def _cell_words(primitive: Heatmap, row: int, column: int) -> str:
        words = f"{primitive.row_names[row]}, {primitive.column_name} {column}"
        value = f"{primitive.values_PQ[row, column]:.4g} {primitive.z_label}"
        detail = "" if primitive.detail_PQ is None else f"{primitive.detail_PQ[row, column]:,} {primitive.detail_label}"
        return "<br>".join(escape(part) for part in (words, value, detail) if part)

    def _bars(self, primitive: Bars) -> None:
        count = len(primitive.names)
        ticks = labelled_rows(count)
        axis = primitive.x_axis()
        # A fifth more room than the longest bar needs: its label stands behind it.
        self._axes(
            _axis(axis) | {"range": [axis.low, axis.high * 1.25], "showgrid": True, "gridcolor": GRID},
            {
                "tickvals": list(ticks),
                "ticktext": [escape(short(primitive.names[i])) for i in ticks],
                "range": [count - 0.5, -0.5],
                "ticks": "",
            },
        )
        self.picture.add_trace(
            {
                "type": "bar",
                "orientation": "h",
                "x": _listed(primitive.values),
                "y": list(range(count)),
                "xaxis": self.x,
                "yaxis": self.y,
                "width": 0.62,
                "marker": {"color": line_color(0)},
                "text": [escape(text) if i in ticks else "" for i, text in enumerate(primitive.labels())],
                "textposition": "outside",
                "cliponaxis": False,
                "customdata": [escape(name) for name in primitive.names],
                "hovertemplate": f"%{{customdata}}<br>%{{x:.5g}} {escape(primitive.x_label)}<extra></extra>",
            }
        )

    def _table(self, primitive: Table) -> None:
        cells = primitive.cells()
        self.picture.add_trace(
            {
                "type": "table",
                "domain": {"x": [0, 1], "y": [self.low, self.high]},
                "header": {
                    "values": [escape(column) for column in primitive.columns],
                    "align": "left",
                    "height": 30,
                    "fill": {"color": "white"},
                    "line": {"color": GRID},
                    "font": {"color": SOFT},
                },
                "cells": {
                    "values": [[escape(row[i]) for row in cells] for i in range(len(primitive.columns))],
                    "align": "left",
                    "height": 28,
                    "fill": {"color": "white"},
                    "line": {"color": GRID},
                },
            }
        )

    def _scatter(self, x: np.ndarray, y: np.ndarray, *, name: str, hover: str | None = None, **fields: Any) -> None:
        trace = {"type": "scatter", "x": _listed(x), "y": _listed(y), "xaxis": self.x, "yaxis": self.y}
        trace |= {"name": escape(name), **fields}
        if hover is not None:
            trace["hovertemplate"] = f"{hover}<extra></extra>"
        self.picture.add_trace(trace)

    def _axes(self, x: dict[str, Any], y: dict[str, Any]) -> None:
        shared = {"tickfont": {"color": SOFT}, "showgrid": False, "zeroline": False, "ticklabelstandoff": 4}
        line = {"showline": True, "linecolor": "#9e9e9e"}
        self.picture.layout[self.x_key] = shared | line | {"anchor": self.y, "domain": [0, 1]} | x
        self.picture.layout[self.y_key] = shared | {"anchor": self.x, "domain": [self.low, self.high]} | y

    def text(
        self,
        text: str,
        *,
        x: float,
        at: float,
        shift: tuple[int, int],
        color: str = INK,
        size: int = 12,
        anchor: str = "left",
    ) -> None:
        self.picture.add_annotation(
            text=text,
            showarrow=False,
            xref="paper",
            yref="paper",
            x=x,
            y=self.low + at * (self.high - self.low),
            xshift=shift[0],
            yshift=shift[1],
            xanchor=anchor,
            yanchor="middle",
            align="left",
            font={"color": color, "size": size},
        )


def _axis(axis: Axis) -> dict[str, Any]:
    """Tick values stay in data units; only the range of a logarithmic axis is in powers of ten."""
    logarithmic = axis.scale != "linear"
    return {
        "title": _axis_title(axis.label),
        "type": "log" if logarithmic else "linear",
        "range": [float(np.log10(v)) if logarithmic else v for v in (axis.low, axis.high)],
        "tickvals": list(axis.ticks),
        "ticktext": list(axis.tick_labels),
    }


def _axis_title(text: str) -> dict[str, Any]:
    return {"text": escape(text), "standoff": 6, "font": {"color": SOFT, "size": 12}}


def _listed(values: np.ndarray) -> list[Any]:
    """Plain numbers with six digits: every plotly front end reads them, and a notebook stays small."""
    if values.ndim == 2:
        return [_listed(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
