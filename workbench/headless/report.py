"""An executed notebook as one HTML file that needs nothing else: no network, no kernel, and no scripts for figures."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

from nbconvert import HTMLExporter
from nbconvert.preprocessors.sanitize import SanitizeHTML
from nbformat import NotebookNode

from workbench.headless.normalize import read

_WIDGET = "application/vnd.jupyter.widget-view+json"
_PLOTLY = "application/vnd.plotly.v1+json"
_SHOWN = (_PLOTLY, "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/markdown", "text/latex", "text/plain")

_TABLE_TAGS = ["caption", "table", "tbody", "td", "tfoot", "th", "thead", "tr"]
_TEXT_TAGS = ["b", "br", "code", "div", "em", "h1", "h2", "h3", "h4", "hr", "i", "li", "ol", "p", "pre", "span", "ul"]

# Every figure is first its picture; where scripts run, the interactive form takes its place.
_SHOW_FIGURES = """
for (const figure of document.querySelectorAll(".figure")) {
  const live = figure.querySelector(".figure-live");
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
  live.hidden = false;
  Plotly.newPlot(live, data, { ...layout, width: undefined, autosize: true }, { responsive: true, displaylogo: false })
    .then(() => { figure.querySelector(".figure-static").hidden = true; });
}
"""


def report(executed: Path | str, html: Path | str) -> Path:
    """Write the executed notebook as a self-contained HTML file and return its path.

    Every figure shows its SVG; where scripts run, plotly's interactive form replaces it. The file's own security
    policy forbids any request and any script but these, so text that came out of a data set can do neither; HTML in
    outputs is sanitized besides. Formulas are shown as their LaTeX source.

    Raises:
        ValueError: there is no notebook, an output exists as a live widget only, or the page would load something.
    """
    notebook = read(Path(executed))
    _make_static(notebook)
    page, _ = _exporter().from_notebook_node(notebook, {"metadata": {"name": Path(executed).stem}})
    _refuse_requests(page)
    scripts = [_plotly_js(), _SHOW_FIGURES] if _has_plotly(notebook) else []
    page = page.replace("<head>", "<head>" + _policy(scripts), 1)
    body, end = page.rsplit("</body>", 1)
    page = "\n".join([body, *(f"<script>{script}</script>" for script in scripts), "</body>" + end])
    target = Path(html)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def _exporter() -> HTMLExporter:
    exporter = HTMLExporter(
        template_name="template",
        extra_template_basedirs=[str(Path(__file__).parent)],
        embed_images=True,
        exclude_anchor_links=True,
    )
    exporter.config.NbConvertBase.display_data_priority = list(_SHOWN)
    return exporter


def _make_static(notebook: NotebookNode) -> None:
    """Leave of every output what a file can show; refuse one that is nothing but a widget."""
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop(_WIDGET, None) is not None and not set(_SHOWN[:-1]) & set(data):
                raise ValueError(f"cell {number} shows a live widget, which no file can hold: run it with live=False")
            if _PLOTLY in data and "image/svg+xml" not in data:
                raise ValueError(f"cell {number} shows a plotly figure without the SVG that its stored form needs")
            if "text/html" in data:
                data["text/html"] = _sanitized(data["text/html"])
    notebook.metadata.pop("widgets", None)


def _sanitized(html: str) -> str:
    """Tables and formatted text, as they are; nothing that runs or loads."""
    without_code = re.sub(r"<(style|script)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
    attributes = {"*": ["class", "style", "title", "colspan", "rowspan"]}
    cleaner = SanitizeHTML(tags=_TABLE_TAGS + _TEXT_TAGS, attributes=attributes, strip=True)
    return cleaner.sanitize_html_tags(without_code)


def _has_plotly(notebook: NotebookNode) -> bool:
    return any(_PLOTLY in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def _plotly_js() -> str:
    """The script that the installed plotly brings along, read as a file: nothing of plotly is run here."""
    script = metadata.distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
    return Path(str(script)).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    """Nothing is loaded from anywhere, and these scripts alone are run."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "font-src": "data:",
        "form-action": "'none'",
        "base-uri": "'none'",
    }
    content = "; ".join(f"{what} {allowed}" for what, allowed in rules.items())
    return f'<meta http-equiv="Content-Security-Policy" content="{content}">'


class _Loads(HTMLParser):
    """Collects what a page would load when it is opened; links to follow are none of it."""

    _ATTRIBUTES = frozenset({"src", "srcset", "poster", "data", "background"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            loads = name in self._ATTRIBUTES or (tag == "link" and name == "href")
            if value and loads and not value.startswith(("data:", "#")):
                self.found.append(value)
            if value and name == "style":
                self.found += _style_loads(value)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += _style_loads(data)


def _style_loads(css: str) -> Iterator[str]:
    for match in re.finditer(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""", css):
        address = match[1] or match[2]
        if not address.startswith(("data:", "#")):
            yield address


def _refuse_requests(page: str) -> None:
    loads = _Loads()
    loads.feed(page)
    if loads.found:
        raise ValueError(f"the report would load {loads.found[0]}: a self-contained file can hold only its own content")
