"""The same primitives through the three renderers: numbers arrive, names stay names, bytes repeat."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas
import pytest

from workbench.widgets import Bars, Heatmap, Line, Lines, Marker, Reference, Table, bundle, fallback, final, live
from workbench.widgets.colors import LINE_COLORS, color_table
from workbench.widgets.front_end import CSS, ESM

EVIL = '<img src=x onerror="alert(1)"> $a$ & </script>'


def decoded(header: dict[str, Any], arrays: live.Arrays, index: int) -> np.ndarray:
    return np.frombuffer(arrays.buffers[index], dtype=f"<{arrays.types[index]}")


def lines(name: str = "training", **fields: Any) -> Lines:
    steps = np.arange(1, 51)
    parts: dict[str, Any] = {
        "title": f"Loss of {name}",
        "x_label": "step",
        "y_label": "nats/byte",
        "lines": (
            Line(name=name, x=steps, y=1.5 + 4 / steps),
            Line(name=f"{name} raw", x=steps, y=1.6 + 4 / steps, faint=True),
            Line(name=f"{name} checked", x=steps[::10], y=2 + 4 / steps[::10], color=1, points=True),
        ),
        "references": (Reference(f"{name} floor", 2.4),),
        "markers": (Marker(x=20, label=f"{name} → 0.1"), Marker(x=30, label=f"{name} spike", kind="spike", y=1.7)),
        "summary": f"{name} fell.",
    }
    return Lines(**(parts | fields))


def heatmap(name: str = "layer", rows: int = 3, columns: int = 8) -> Heatmap:
    counts = np.arange(rows * columns).reshape(rows, columns)
    mean = counts.mean() if counts.size else 1.0
    return Heatmap(
        title=f"Load of {name}",
        x_label="expert",
        y_label=name,
        z_label="× mean",
        values_PQ=counts / mean,
        row_names=tuple(f"{name} {row}" for row in range(rows)),
        column_name="expert",
        low=0.0,
        high=2.0,
        z_ticks=((0.0, "0"), (1.0, f"1 {name}"), (2.0, "≥ 2")),
        detail_PQ=counts,
        detail_label="tokens",
        marked_PQ=counts < 1,
        mark_label=f"dead {name}",
        summary=f"{name} is uneven.",
    )


def bars(name: str = "layer") -> Bars:
    return Bars(
        title=f"MaxVio of {name}",
        x_label="(max − mean) / mean",
        y_label=name,
        names=(name, f"{name} 2"),
        values=np.array([0.5, 1.25]),
        notes=("", f"1 {name}"),
        summary=f"{name} 1.25.",
    )


def table(name: str = "corpus") -> Table:
    return Table(
        title=f"By {name}", columns=("what", name), rows=((name, 1.5), ("code", 2.25)), summary=f"{name}: two."
    )


def everything(name: str = "layer") -> list[Lines | Heatmap | Bars | Table]:
    return [lines(name), heatmap(name), bars(name), table(name)]


def test_live_buffers_hold_the_numbers() -> None:
    curve, grid = lines(), heatmap()
    headers, arrays = live.encode([curve, grid])
    json.dumps(headers, allow_nan=False)
    for line, header in zip(curve.lines, headers[0]["lines"], strict=True):
        np.testing.assert_array_equal(decoded(header, arrays, header["x"]), line.x.astype(np.float32))
        np.testing.assert_array_equal(decoded(header, arrays, header["y"]), line.y.astype(np.float32))
    values = decoded(headers[1], arrays, headers[1]["values"]).reshape(grid.values_PQ.shape)
    np.testing.assert_array_equal(values, grid.values_PQ.astype(np.float32))
    detail = decoded(headers[1], arrays, headers[1]["detail"])
    assert arrays.types[headers[1]["detail"]] == "i4"
    np.testing.assert_array_equal(detail, np.arange(24))


def test_live_lines_are_thinned_and_numbers_leave_the_json() -> None:
    steps = np.arange(200_000)
    long = lines(lines=(Line(name="long", x=steps, y=np.sin(steps)),))
    headers, arrays = live.encode([long])
    assert len(arrays.buffers[0]) <= 4 * live.POINTS_PER_LINE
    assert len(json.dumps(headers)) < 3000


def test_final_figure_holds_the_numbers() -> None:
    figure: dict[str, Any] = json.loads(str(final.figure(everything(), "run", "running").to_json()))
    by_type = {trace["type"]: trace for trace in figure["data"]}
    assert figure["data"][0]["y"][0] == 5.5
    np.testing.assert_allclose(by_type["heatmap"]["z"], heatmap().values_PQ, rtol=1e-5)
    assert by_type["bar"]["x"] == [0.5, 1.25]
    assert by_type["table"]["cells"]["values"] == [["layer", "code"], ["1.5", "2.25"]]
    words = " ".join(note["text"] for note in figure["layout"]["annotations"])
    assert "layer floor" in words and "<b>run</b>" in words and "running" in words


def test_final_panels_do_not_overlap() -> None:
    figure = final.figure(everything()).to_plotly_json()
    layout = figure["layout"]
    domains = sorted(axis["domain"] for key, axis in layout.items() if key.startswith("yaxis"))
    domains.append(next(t["domain"]["y"] for t in figure["data"] if t["type"] == "table"))
    domains.sort()
    assert all(low[1] < high[0] for low, high in pairwise(domains))
    assert domains[0][0] >= 0 and domains[-1][1] <= 1


def test_svg_is_wellformed_and_the_same_bytes_twice() -> None:
    first = fallback.svg(everything(), "run", "running")
    assert first == fallback.svg(everything(), "run", "running")
    assert "<dc:date>" not in first
    root = ElementTree.fromstring(first)
    words = " ".join(root.itertext())
    for expected in ("Loss of layer", "nats/byte", "layer floor", "expert", "MaxVio of layer", "2.25", "run"):
        assert expected in words


@pytest.mark.parametrize("primitives", [everything(EVIL)], ids=["names as markup"])
def test_names_are_never_markup(primitives: list[Any]) -> None:
    stored = bundle.bundle(primitives, EVIL, EVIL)
    root = ElementTree.fromstring(stored["image/svg+xml"])
    assert not [element for element in root.iter() if element.tag.endswith("}img") or element.tag.endswith("}script")]
    assert EVIL in " ".join(root.itertext())
    assert "<img" not in stored["image/svg+xml"]
    figure = json.dumps(stored[bundle.PLOTLY])
    assert "<img" not in figure and "</script" not in figure and "&lt;img" in figure
    page = bundle.html(primitives, EVIL, EVIL)
    body = page[page.index("In words") :]
    assert "<img" not in body and "&lt;img" in body and "<title>&lt;img" in page
    # Text stays text in what is no markup.
    assert EVIL in stored["text/plain"]
    assert EVIL in " ".join(pandas.read_csv(io.StringIO(bundle.csv(primitives)))["panel"])


def test_the_bundle_is_complete_and_small() -> None:
    stored = bundle.bundle(everything())
    assert set(stored) == {bundle.PLOTLY, "image/svg+xml", "text/plain"}
    assert stored["text/plain"].splitlines()[0] == "Loss of layer: layer fell."
    assert "bdata" not in json.dumps(stored[bundle.PLOTLY])
    assert len(json.dumps(stored)) < 150_000


def test_html_needs_no_network() -> None:
    page = bundle.html([bars()], "run", "running")
    assert "<script src" not in page and "plotly" in page.lower()


def test_csv_holds_every_number() -> None:
    read = pandas.read_csv(io.StringIO(bundle.csv(everything())))
    assert set(read["panel"]) == {primitive.title for primitive in everything()}
    loads = read[read["panel"] == "Load of layer"]
    np.testing.assert_array_equal(loads["tokens"], np.arange(24))
    np.testing.assert_allclose(loads["× mean"], heatmap().values_PQ.ravel())
    assert bundle.csv([Table(title="t", columns=("a",), rows=(), summary="nothing")]) == ""


def test_a_lines_frame_is_one_row_per_step() -> None:
    frame = lines().frame()
    assert list(frame.columns) == ["step", "training", "training raw", "training checked", "training floor"]
    assert len(frame) == 50
    assert int(frame["training checked"].notna().to_numpy().sum()) == 5


@pytest.mark.parametrize(
    "primitive",
    [
        lines(lines=()),
        heatmap(rows=0),
        Bars(title="b", x_label="x", y_label="y", names=(), values=np.zeros(0), summary="nothing <b>"),
        Table(title="t", columns=("a",), rows=(), summary="nothing <b>"),
    ],
    ids=lambda primitive: type(primitive).__name__,
)
def test_empty_primitives_say_so_everywhere(primitive: Any) -> None:
    headers, _ = live.encode([primitive])
    assert headers[0]["kind"] == "empty"
    stored = bundle.bundle([primitive])
    assert primitive.summary in " ".join(ElementTree.fromstring(stored["image/svg+xml"]).itertext())
    assert primitive.summary in stored["text/plain"]


def test_a_logarithmic_chart_draws_without_its_zeros() -> None:
    steps = np.arange(10)
    chart = lines(
        lines=(Line(name="z", x=steps, y=steps * 0.01),), references=(Reference("none", 0.0),), y_scale="log10"
    )
    figure = final.figure([chart]).to_plotly_json()
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert "z" in fallback.svg([chart])
    assert [label["text"] for label in live.encode([chart])[0][0]["labels"]] == ["z"]


def test_a_large_heatmap_is_drawn_whole() -> None:
    grid = heatmap(rows=58, columns=256)
    headers, arrays = live.encode([grid])
    assert len(arrays.buffers[headers[0]["values"]]) == 4 * 58 * 256
    picture = fallback.svg([grid])
    assert "Load of layer" in picture and picture == fallback.svg([grid])
    assert len(picture) < 150_000


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: Line(name="a", x=np.arange(3), y=np.arange(2)), "must be equally long"),
        (
            lambda: Bars(title="b", x_label="", y_label="", names=("a",), values=np.zeros(2), summary=""),
            "1 names, 2 values",
        ),
        (lambda: replace(heatmap(), row_names=("a",)), "1 row names for 3 rows"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        build()


def test_the_front_end_is_small_local_and_never_parses_markup() -> None:
    assert len(ESM.encode()) <= 30_000
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "http://", "https://", "import "):
        assert forbidden not in ESM, forbidden
    assert "url(" not in CSS and "@import" not in CSS


def test_colours() -> None:
    assert len(color_table()) == 768
    assert len(set(LINE_COLORS)) == len(LINE_COLORS)
