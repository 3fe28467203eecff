"""What a notebook stores of a view, and the files that a reader may take home."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas

from workbench.widgets.fallback import svg
from workbench.widgets.final import figure
from workbench.widgets.primitives import Primitive

PLOTLY = "application/vnd.plotly.v1+json"


def bundle(primitives: Sequence[Primitive], title: str = "", status: str = "") -> dict[str, Any]:
    """One output that shows everywhere: plotly in JupyterLab, SVG where no script runs, words in a terminal."""
    picture: dict[str, Any] = json.loads(str(figure(primitives, title, status).to_json()))
    # Not `responsive`: JupyterLab fits the width by itself, and with both a window that changes its height takes the
    # figure's height to nothing.
    picture["config"] = {"displaylogo": False}
    return {
        PLOTLY: picture,
        "image/svg+xml": svg(primitives, title, status),
        "text/plain": text(primitives, title, status),
    }


def text(primitives: Sequence[Primitive], title: str = "", status: str = "") -> str:
    """A line for the whole and one per primitive."""
    heading = [f"{title}: {status}"] if title else []
    return "\n".join(heading + [f"{primitive.title}: {primitive.summary}" for primitive in primitives])


def csv(primitives: Sequence[Primitive]) -> str:
    """All numbers in one table; its first column names the panel they belong to."""
    frames = [primitive.frame().assign(panel=primitive.title) for primitive in primitives if not primitive.empty]
    if not frames:
        return ""
    table = pandas.concat(frames, ignore_index=True)
    columns = ["panel", *(column for column in table.columns if column != "panel")]
    target = io.StringIO()
    table.to_csv(target, columns=columns, index=False)
    return target.getvalue()


def html(primitives: Sequence[Primitive], title: str, status: str) -> str:
    """A page that carries plotly.js with it (about 5 MB) and opens without a network."""
    picture = figure(primitives, title, status).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False}
    )
    lines = "".join(f"<li>{escape(p.title)}: {escape(p.summary)}</li>" for p in primitives)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:14px system-ui,sans-serif;color:#212121;max-width:1100px;margin:24px auto;padding:0 16px}"
        f"</style></head><body>{picture}<h2>In words</h2><ul>{lines}</ul></body></html>"
    )
