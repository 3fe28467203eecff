"""A report is one file: it loads nothing, shows figures with and without scripts, and runs no text of a data set."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Browser

from workbench.headless import report

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="200" height="80"><rect width="200" height="80" fill="#c00"/></svg>'
)
PWN = "window.pwned = 1"
ATTACK = f"<script>{PWN}</script><img src=data:, onerror='{PWN}'></p><svg onload='{PWN}'>"
FIGURE = {"data": [{"type": "bar", "x": ["a", ATTACK], "y": [1, 2]}], "layout": {"title": {"text": ATTACK}}}


def write(path: Path, *outputs: NotebookNode, markdown: str = "# A title\n\nText.") -> Path:
    cells = [new_markdown_cell(markdown), *(new_code_cell("show()", outputs=[output]) for output in outputs)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def shown(**data: object) -> NotebookNode:
    names = {"plotly": PLOTLY, "svg": "image/svg+xml", "text": "text/plain", "html": "text/html", "widget": WIDGET}
    return new_output("display_data", data={names[key]: value for key, value in data.items()})


def test_one_file_shows_everything_and_runs_nothing_else(tmp_path: Path, browser: Browser):
    table = "<style>td {color: red}</style><table><tr><td>cell</td></tr></table>" + ATTACK
    notebook = write(
        tmp_path / "a.ipynb",
        shown(plotly=FIGURE, svg=SVG, text=f"two bars {ATTACK}"),
        shown(plotly=FIGURE, svg=SVG, text="two bars"),
        shown(svg=SVG, text="one picture"),
        shown(html=table, text="table"),
        new_output("stream", name="stdout", text=f"token {ATTACK}\n"),
        shown(widget={"model_id": "x"}, svg=SVG, text="was a widget"),
        markdown=f"# A title\n\n{ATTACK}",
    )
    path = report(notebook, tmp_path / "sub" / "a.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1
    assert WIDGET not in text and "require.js" not in text and "mathjax" not in text.lower().split("plotly.js v")[0]

    page = browser.new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length === 2")
    page.wait_for_function("[...document.querySelectorAll('.figure-static')].every(e => e.hidden)")
    assert page.evaluate("window.pwned") is None
    assert [url for url in requested if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert page.locator("h1").inner_text() == "A title"
    assert page.locator("td").inner_text() == "cell"
    assert f"token {ATTACK}" in page.locator("main").inner_text()


def test_figures_are_visible_without_scripts(tmp_path: Path, browser: Browser):
    path = report(write(tmp_path / "a.ipynb", shown(plotly=FIGURE, svg=SVG, text="two bars")), tmp_path / "a.html")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    picture = page.get_by_alt_text("two bars")
    assert picture.is_visible() and picture.bounding_box() is not None
    assert picture.evaluate("e => e.complete && e.naturalWidth") == 200


def test_a_report_without_figures_carries_no_script(tmp_path: Path):
    text = report(write(tmp_path / "a.ipynb", shown(text="plain")), tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in text and len(text) < 1_000_000


@pytest.mark.parametrize(
    ("output", "markdown", "said"),
    [
        (shown(widget={"model_id": "x"}, text="Dashboard()"), "", "cell 2 shows a live widget"),
        (shown(plotly=FIGURE, text="x"), "", "cell 2 shows a plotly figure without the SVG"),
        (shown(text="x"), "![far](https://example.org/x.png)", "would load https://example.org/x.png"),
        (shown(text="x"), "<link rel=stylesheet href=//example.org/x.css>", "would load //example.org/x.css"),
        (shown(text="x"), "<p style='background: url(https://example.org/y)'>", "would load https://example.org/y"),
        (shown(text="x"), "<style>@import 'https://example.org/z';</style>", "would load https://example.org/z"),
    ],
)
def test_what_no_file_can_hold_is_refused_in_one_line(tmp_path: Path, output: NotebookNode, markdown: str, said: str):
    with pytest.raises(ValueError) as caught:
        report(write(tmp_path / "a.ipynb", output, markdown=markdown), tmp_path / "a.html")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "a.html").exists()


def test_a_link_to_follow_is_allowed(tmp_path: Path):
    notebook = write(tmp_path / "a.ipynb", shown(text="x"), markdown="[paper](https://arxiv.org/abs/2412.19437)")
    assert "https://arxiv.org/abs/2412.19437" in report(notebook, tmp_path / "a.html").read_text(encoding="utf-8")
