"""Draw what `run.py --plot` measured: a roofline of the products, and the bandwidth of the ops that move memory."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

OURS = "workbench_kernels"
TITLES = ("Products: rate by floating-point operations per byte", "Ops that move memory: share of the copy's bandwidth")
INTENSITY, RATE, SHARE = "operations per byte that must move", "TFLOP/s", "share of copy bandwidth"


def draw(lines: Sequence[Line], path: Path) -> tuple[Path, Path]:
    """Write `path` with the endings .html (values on hover) and .png; returns both."""
    ceilings = {line["ceiling"]: line for line in lines if "matmul_tflops" in line}
    measured = [line for line in lines if line.get("direction") == "forward"]
    products = [line for line in measured if line["bound_by"] == "matmul"]
    moved = [line for line in measured if line["bound_by"] == "copy" and line["candidate"] == OURS]
    machine = next(line for line in lines if "machine" in line)
    title = f"{machine['machine']}, torch {machine['torch']}, {machine['date']}"
    return _html(products, moved, ceilings, title, path.with_suffix(".html")), _png(
        products, moved, ceilings, title, path.with_suffix(".png")
    )


def roof(ceiling: Line, intensity: float) -> float:
    """TFLOP/s that neither the matrix units nor the memory allow to exceed."""
    return min(ceiling["matmul_tflops"], intensity * ceiling["copy_gb_per_s"] / 1000)


def _span(products: Sequence[Line]) -> list[float]:
    intensities = [line["flops_per_byte"] for line in products] or [1.0]
    low, high = min(intensities) / 4, max(intensities) * 4
    return [low * (high / low) ** (step / 60) for step in range(61)]


def _by_candidate(products: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    names = sorted({(line["candidate"], line["dtype"]) for line in products})
    return {name: [line for line in products if (line["candidate"], line["dtype"]) == name] for name in names}


def _label(line: Line) -> str:
    return f"{line['op']} {line['shape']} {line['dtype']}"


def _html(products: Sequence[Line], moved: Sequence[Line], ceilings: dict[str, Line], title: str, path: Path) -> Path:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, subplot_titles=TITLES, vertical_spacing=0.12)
    for dtype, ceiling in ceilings.items():
        span = _span(products)
        heights = [roof(ceiling, x) for x in span]
        figure.add_trace(go.Scatter(x=span, y=heights, mode="lines", name=f"roof, {dtype}"), row=1, col=1)
    for (candidate, dtype), points in _by_candidate(products).items():
        figure.add_trace(
            go.Scatter(
                x=[line["flops_per_byte"] for line in points],
                y=[line["tflops"] for line in points],
                text=[html.escape(f"{_label(x)}: {x['median_ms']} ms, {x['of_ceiling']:.0%}") for x in points],
                mode="markers",
                marker_symbol="circle" if dtype == "float32" else "diamond-open",
                name=f"{candidate}, {dtype}",
            ),
            row=1,
            col=1,
        )
    shares = [line["of_ceiling"] for line in moved]
    figure.add_trace(
        go.Bar(x=shares, y=[_label(line) for line in moved], orientation="h", name=OURS, showlegend=False), row=2, col=1
    )
    figure.update_xaxes(type="log", title=INTENSITY, row=1, col=1)
    figure.update_yaxes(type="log", title=RATE, row=1, col=1)
    figure.update_xaxes(title=SHARE, tickformat=".0%", row=2, col=1)
    figure.update_layout(title=html.escape(title), height=1100, margin={"l": 330})
    figure.write_html(path)
    return path


def _png(products: Sequence[Line], moved: Sequence[Line], ceilings: dict[str, Line], title: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), layout="constrained")
    above, below = figure.subplots(2, 1)
    for dtype, ceiling in ceilings.items():
        span = _span(products)
        above.plot(span, [roof(ceiling, x) for x in span], label=f"roof, {dtype}")
    for (candidate, dtype), points in _by_candidate(products).items():
        marker, label = "o" if dtype == "float32" else "D", f"{candidate}, {dtype}"
        above.plot([x["flops_per_byte"] for x in points], [x["tflops"] for x in points], marker, label=label, alpha=0.7)
    above.set(xscale="log", yscale="log", xlabel=INTENSITY, ylabel=RATE, title=TITLES[0])
    above.legend(fontsize="small")
    below.barh([_label(line) for line in moved], [line["of_ceiling"] for line in moved])
    below.set(xlabel=SHARE, title=TITLES[1])
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return path
