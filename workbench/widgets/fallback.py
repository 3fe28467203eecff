"""The fallback renderer: an SVG by matplotlib that needs no browser and is the same bytes for the same data."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from workbench.widgets.axes import Axis, whole_ticks
from workbench.widgets.colors import COLOR_MAP, line_color
from workbench.widgets.layout import (
    BOTTOM,
    CHANGE_ROW,
    HEADING,
    end_labels,
    labelled_rows,
    plot_height,
    short,
    top_margin,
)
from workbench.widgets.primitives import Bars, Heatmap, Lines, Primitive, Table, thin

WIDTH = 900
TITLE = 26
LEFT = 64
PIXELS_PER_INCH = 96
POINTS_PER_LINE = 1000
# A path costs about 150 bytes; beyond this many cells a heatmap is an embedded picture.
VECTOR_CELLS = 2048

INK = "#212121"
SOFT = "#616161"
GRID = "#e6e6e6"

# matplotlib reads these only from its process-wide settings; the lock keeps two figures of ours from mixing theirs.
_settings_lock = threading.Lock()
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "moe-workbench",
    "svg.fonttype": "none",
    # Names are data: a dollar sign in one of them is a dollar sign.
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.linewidth": 0.8,
}


def svg(primitives: Sequence[Primitive], title: str = "", status: str = "") -> str:
    """All primitives in one picture, `WIDTH` pixels wide, packed into rows by their `span`, under a title line."""
    rows = pack(primitives)
    heights = [max(TITLE + top_margin(p) + plot_height(p) + BOTTOM for p in row) for row in rows]
    with _settings_lock, matplotlib.rc_context(_SETTINGS):
        below = (HEADING if title else 0) + max(sum(heights), 40)
        figure = Figure(figsize=(WIDTH / PIXELS_PER_INCH, below / PIXELS_PER_INCH), facecolor="white")
        if title:
            figure.text(8 / WIDTH, 1 - 22 / below, title, size=13, weight="bold", color=INK)
            figure.text(8 / WIDTH, 1 - 42 / below, status, color=SOFT)
            below -= HEADING
        for row, row_height in zip(rows, heights, strict=True):
            left = 0.0
            total = max(12, sum(p.span for p in row))
            for primitive in row:
                width = WIDTH * primitive.span / total
                _panel(figure, primitive, left=left, top=below, width=width)
                left += width
            below -= row_height
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return target.getvalue()


def pack(primitives: Sequence[Primitive]) -> list[list[Primitive]]:
    """Rows of at most twelve twelfths, in the given order."""
    rows: list[list[Primitive]] = []
    for primitive in primitives:
        if rows and sum(p.span for p in rows[-1]) + primitive.span <= 12:
            rows[-1].append(primitive)
        else:
            rows.append([primitive])
    return rows


def _panel(figure: Figure, primitive: Primitive, *, left: float, top: float, width: float) -> None:
    page = figure.get_figheight() * PIXELS_PER_INCH
    right_margin = _right_margin(primitive)
    plot_top = top - TITLE - top_margin(primitive)
    plot = plot_height(primitive)
    indent = LEFT if not isinstance(primitive, Bars | Heatmap) else 14 + _text_width(_row_names(primitive))
    indent = 8 if isinstance(primitive, Table) else indent
    box = (left + indent, plot_top - plot, max(40, width - indent - right_margin), plot)
    title = short(primitive.title, int(width / 8))
    figure.text((left + 8) / WIDTH, (top - 17) / page, title, size=10.5, weight="bold", color=INK)
    axes = figure.add_axes((box[0] / WIDTH, box[1] / page, box[2] / WIDTH, box[3] / page))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9e9e9e")
    axes.tick_params(colors=SOFT, length=3, width=0.8)
    if primitive.empty:
        axes.axis("off")
        axes.text(0.5, 0.5, primitive.summary, ha="center", color=SOFT, transform=axes.transAxes)
        return
    if isinstance(primitive, Table):
        _draw_table(axes, primitive)
        return
    y_label = primitive.y_label
    figure.text((left + 8) / WIDTH, (plot_top + 9 + _changes(primitive)) / page, y_label, color=SOFT)
    axes.set_xlabel(primitive.x_label, color=SOFT, labelpad=4)
    if isinstance(primitive, Lines):
        _draw_lines(axes, primitive)
    elif isinstance(primitive, Heatmap):
        _draw_heatmap(figure, axes, primitive, box, page)
    else:
        _draw_bars(axes, primitive)


def _changes(primitive: Primitive) -> int:
    return top_margin(primitive) - 24 if isinstance(primitive, Lines) else 0


def _row_names(primitive: Bars | Heatmap) -> tuple[str, ...]:
    names = primitive.names if isinstance(primitive, Bars) else primitive.row_names
    return tuple(short(name) for name in names)


def _right_margin(primitive: Primitive) -> float:
    if primitive.empty or isinstance(primitive, Table):
        return 12
    if isinstance(primitive, Lines):
        return 30 + _text_width([label.text for label in end_labels(primitive, primitive.y_axis())])
    if isinstance(primitive, Heatmap):
        return 40 + _text_width([text for _, text in primitive.z_ticks])
    return 14 + _text_width([short(text) for text in primitive.labels()])


def _text_width(texts: Sequence[str]) -> float:
    # 7 pixels: a wide average letter of the 8.5 point face. Estimated, because SVG text is set by the viewer.
    return 7 * max((len(text) for text in texts), default=0)


def _draw_lines(axes: Axes, primitive: Lines) -> None:
    x_axis, y_axis = primitive.x_axis(), primitive.y_axis()
    _set_axis(axes, "x", x_axis)
    _set_axis(axes, "y", y_axis)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for reference in primitive.references:
        axes.axhline(reference.y, color=SOFT, linewidth=0.9, dashes=(4, 3))
    for line in primitive.lines:
        x, y = thin(line.x, line.y, POINTS_PER_LINE)
        axes.plot(
            x,
            y,
            color=line_color(line.color),
            linewidth=0.7 if line.faint else 1.6,
            alpha=0.35 if line.faint else 1.0,
            marker="o" if line.points else None,
            markersize=3.5,
        )
    spikes = [m for m in primitive.markers if m.kind == "spike" and np.isfinite(m.y)]
    if spikes:
        axes.plot([m.x for m in spikes], [m.y for m in spikes], "v", color=INK, markersize=4.5, clip_on=False)
    free_from = -np.inf
    for marker in sorted((m for m in primitive.markers if m.kind == "change"), key=lambda m: m.x):
        axes.axvline(marker.x, color=SOFT, linewidth=0.9, dashes=(1, 2))
        at = x_axis.fraction(marker.x) * axes.get_position().width * WIDTH
        if at >= free_from:
            offset = 1 + CHANGE_ROW / (4 * plot_height(primitive))
            axes.text(x_axis.fraction(marker.x), offset, marker.label, color=SOFT, size=7.5, transform=axes.transAxes)
            free_from = at + _text_width([marker.label])
    for label in end_labels(primitive, y_axis):
        color = SOFT if label.color is None else line_color(label.color)
        axes.plot(
            [1.005, 1.018],
            [label.anchor, label.at],
            color=color,
            linewidth=1.2,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(1.024, label.at, label.text, color=INK, va="center", transform=axes.transAxes)


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    setting = {"linear": {}, "log2": {"base": 2}, "log10": {"base": 10}}[axis.scale]
    scale = "linear" if axis.scale == "linear" else "log"
    (axes.set_xscale if which == "x" else axes.set_yscale)(scale, **setting)
    (axes.set_xlim if which == "x" else axes.set_ylim)(axis.low, axis.high)
    (axes.set_xticks if which == "x" else axes.set_yticks)(axis.ticks, axis.tick_labels)
    (axes.set_xticks if which == "x" else axes.set_yticks)([], minor=True)


def _draw_heatmap(
    figure: Figure, axes: Axes, primitive: Heatmap, box: tuple[float, float, float, float], page: float
) -> None:
    norm = Normalize(primitive.low, primitive.high)
    rows, columns = primitive.values_PQ.shape
    edges = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    if rows * columns <= VECTOR_CELLS:
        # Vector cells: sharp at every zoom.
        axes.pcolormesh(
            np.arange(columns + 1) - 0.5,
            np.arange(rows + 1) - 0.5,
            primitive.values_PQ,
            cmap=COLOR_MAP,
            norm=norm,
            edgecolors="white",
            linewidth=0.5 if box[3] / rows > 8 and box[2] / columns > 5 else 0,
            antialiased=False,
        )
    else:
        axes.imshow(
            primitive.values_PQ, cmap=COLOR_MAP, norm=norm, extent=edges, aspect="auto", interpolation="nearest"
        )
    axes.set_xlim(edges[:2])
    axes.set_ylim(edges[2:])
    axes.set_xticks(whole_ticks(columns, 16))
    axes.set_yticks(labelled_rows(rows), [short(primitive.row_names[i]) for i in labelled_rows(rows)])
    if primitive.marked_PQ is not None and primitive.marked_PQ.any():
        marked_rows, marked_columns = np.nonzero(primitive.marked_PQ)
        axes.plot(marked_columns, marked_rows, "x", color="white", markersize=3.5, markeredgewidth=0.9)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    bar_axes = figure.add_axes(
        ((box[0] + box[2] + 12) / WIDTH, box[1] / page, 10 / WIDTH, box[3] / page), label="colour bar"
    )
    bar = figure.colorbar(ScalarMappable(norm, COLOR_MAP), cax=bar_axes)
    bar.set_ticks([value for value, _ in primitive.z_ticks], labels=[text for _, text in primitive.z_ticks])
    bar.ax.tick_params(colors=SOFT, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    figure.text((box[0] + box[2] + 22) / WIDTH, (box[1] + box[3] + 9) / page, primitive.z_label, ha="right", color=SOFT)


def _draw_bars(axes: Axes, primitive: Bars) -> None:
    count = len(primitive.names)
    axis = primitive.x_axis()
    _set_axis(axes, "x", axis)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.barh(np.arange(count), primitive.values, height=0.62, color=line_color(0))
    for row, text in enumerate(primitive.labels()):
        if row not in labelled_rows(count):
            continue
        axes.annotate(
            short(text), (float(primitive.values[row]), row), (5, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(labelled_rows(count), [short(primitive.names[i]) for i in labelled_rows(count)])
    axes.set_ylim(count - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_table(axes: Axes, primitive: Table) -> None:
    axes.axis("off")
    cells = [list(primitive.columns), *primitive.cells()]
    widths = np.array([max(len(row[i]) for row in cells) + 3 for i in range(len(primitive.columns))], dtype=float)
    starts = np.concatenate([[0.0], np.cumsum(widths / widths.sum())[:-1]])
    for index, row in enumerate(cells):
        y = 1 - (index + 0.5) / len(cells)
        for start, text in zip(starts, row, strict=True):
            axes.text(start, y, text, va="center", color=SOFT if index == 0 else INK, transform=axes.transAxes)
        axes.plot([0, 1], [1 - (index + 1) / len(cells)] * 2, color=GRID, linewidth=0.8, transform=axes.transAxes)
