"""The four things a view is made of. They hold numbers and words; the three renderers turn them into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas

from workbench.widgets.axes import Axis, Scale, Unit, fit, number


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """One series, named at its right end by `label`, or by its `name` when that is empty.

    `faint` draws it thin and without a label behind the others; `points` puts a dot on every value.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    label: str = ""
    color: int = 0
    faint: bool = False
    points: bool = False

    def __post_init__(self) -> None:
        if np.shape(self.x) != np.shape(self.y) or np.ndim(self.x) != 1:
            raise ValueError(f"line {self.name!r}: x {np.shape(self.x)} and y {np.shape(self.y)} must be equally long")


@dataclass(frozen=True)
class Reference:
    """A horizontal line with a name: a level to compare with."""

    name: str
    y: float


@dataclass(frozen=True, kw_only=True)
class Marker:
    """Something that happened at `x`: `spike` is drawn as a triangle at `y`, `change` as a vertical line."""

    x: float
    label: str
    kind: str = "change"
    y: float = float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Series over a common axis. `span` is the width wanted, in twelfths of the view."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    summary: str
    references: tuple[Reference, ...] = ()
    markers: tuple[Marker, ...] = ()
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    x_unit: Unit = "number"
    y_unit: Unit = "number"
    span: int = 12

    @property
    def empty(self) -> bool:
        return not any(len(line.x) for line in self.lines)

    def x_axis(self) -> Axis:
        # A change is marked at the first step that it holds for, which may be still to come.
        xs = [line.x for line in self.lines] + [[marker.x for marker in self.markers]]
        return fit(xs, label=self.x_label, scale=self.x_scale, unit=self.x_unit, tight=True)

    def y_axis(self) -> Axis:
        ys = [line.y for line in self.lines] + [[reference.y for reference in self.references]]
        return fit(ys, label=self.y_label, scale=self.y_scale, unit=self.y_unit, tight=False)

    def frame(self) -> pandas.DataFrame:
        """One row per x, one column per line and reference."""
        columns = [pandas.Series(line.y, index=line.x, name=line.name) for line in self.lines]
        columns = [column.groupby(level=0).last() for column in columns]
        table = pandas.concat(columns, axis=1).sort_index() if columns else pandas.DataFrame()
        for reference in self.references:
            table[reference.name] = reference.y
        return table.rename_axis(self.x_label).reset_index()


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """A grid of values, rows from top to bottom.

    Colours run from `low` to `high`, whatever the data, so that they mean the same at every step and in every run;
    a value outside takes the colour of the end, which the colour bar says. `detail_PQ` is a second number per cell for
    tooltips and tables (int32 or float32); cells of `marked_PQ` get a cross and the words of `mark_label`.
    """

    title: str
    x_label: str
    y_label: str
    z_label: str
    values_PQ: np.ndarray
    row_names: tuple[str, ...]
    column_name: str
    low: float
    high: float
    z_ticks: tuple[tuple[float, str], ...]
    summary: str
    detail_PQ: np.ndarray | None = None
    detail_label: str = ""
    marked_PQ: np.ndarray | None = None
    mark_label: str = ""
    span: int = 8

    def __post_init__(self) -> None:
        if len(self.row_names) != len(self.values_PQ):
            raise ValueError(f"{len(self.row_names)} row names for {len(self.values_PQ)} rows of {self.title!r}")

    @property
    def empty(self) -> bool:
        return self.values_PQ.size == 0

    def frame(self) -> pandas.DataFrame:
        """One row per cell."""
        rows, columns = self.values_PQ.shape
        table = pandas.DataFrame(
            {
                self.y_label: np.repeat(np.asarray(self.row_names, dtype=object), columns),
                self.column_name: np.tile(np.arange(columns), rows),
                self.z_label: self.values_PQ.ravel(),
            }
        )
        if self.detail_PQ is not None:
            table[self.detail_label] = self.detail_PQ.ravel()
        return table


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """Horizontal bars, one per row, from top to bottom; `notes` are words after the value."""

    title: str
    x_label: str
    y_label: str
    names: tuple[str, ...]
    values: np.ndarray
    summary: str
    notes: tuple[str, ...] = ()
    x_unit: Unit = "number"
    span: int = 4

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or (self.notes and len(self.notes) != len(self.names)):
            counts = f"{len(self.names)} names, {len(self.values)} values, {len(self.notes)} notes"
            raise ValueError(f"{self.title!r} must have as many of each: {counts}")

    @property
    def empty(self) -> bool:
        return len(self.values) == 0

    def x_axis(self) -> Axis:
        return fit([self.values, [0.0]], label=self.x_label, scale="linear", unit=self.x_unit, tight=True)

    def labels(self) -> tuple[str, ...]:
        """What stands at the end of each bar."""
        notes = self.notes or ("",) * len(self.names)
        return tuple(
            f"{number(float(value), self.x_unit, 3)}{'  ' + note if note else ''}"
            for value, note in zip(self.values, notes, strict=True)
        )

    def frame(self) -> pandas.DataFrame:
        table = pandas.DataFrame({self.y_label: list(self.names), self.x_label: self.values})
        if self.notes:
            table["note"] = list(self.notes)
        return table


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of short texts and numbers under `columns`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[str | float], ...]
    summary: str
    span: int = field(default=12)

    @property
    def empty(self) -> bool:
        return not self.rows

    def cells(self) -> list[list[str]]:
        """Every cell as text."""
        return [[cell if isinstance(cell, str) else number(float(cell)) for cell in row] for row in self.rows]

    def frame(self) -> pandas.DataFrame:
        return pandas.DataFrame(list(self.rows), columns=list(self.columns))


Primitive = Lines | Heatmap | Bars | Table


def thin(x: np.ndarray, y: np.ndarray, at_most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `at_most` of the points, by keeping the lowest and the highest of each bucket: no spike is lost.

    Shorter series come back unchanged; the last point is always kept.
    """
    count = len(x)
    if count <= at_most:
        return x, y
    buckets = (at_most - 1) // 2
    edges = np.linspace(0, count - 1, buckets + 1).astype(np.int64)
    width = int(np.diff(edges).max())
    # [buckets, width] indices; the surplus of the shorter buckets repeats their last point.
    index = np.minimum(edges[:-1, None] + np.arange(width), edges[1:, None] - 1)
    values = np.where(np.isfinite(y[index]), y[index], np.nanmedian(y))
    rows = np.arange(buckets)
    picked = np.concatenate(
        [index[rows, values.argmin(axis=1)], index[rows, values.argmax(axis=1)], np.array([count - 1])]
    )
    kept = np.unique(picked)
    return x[kept], y[kept]
