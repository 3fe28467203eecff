"""Every notebook runs, in fast mode and without a screen, and shows what it stores.

Stored outputs are those of `fast=True, live=False`, whatever the notebook's own parameters are.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell
from playwright.sync_api import Browser, Locator

from workbench.headless import complaints, normalized_text, parameters, read, report, run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
TESTED = {"fast": True, "live": False}

# nbval compares every form of an output that it does not know to be volatile; stored are the text forms alone.
COMPARE_TEXT_ALONE = """
def pytest_collection_modifyitems(items):
    for item in items:
        drawn = ("application/vnd.plotly.v1+json", "image/svg+xml", "text/html")
        item.parent.skip_compare = (*item.parent.skip_compare, *drawn)
"""

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Toured:
    """What the command behind `make tour` was told to fill, and what it printed."""

    folder: Path
    stdout: str

    @property
    def report(self) -> Path:
        return Path(self.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> Toured:
    """Run once: the tour is the longest of the notebooks."""
    folder = tmp_path_factory.mktemp("toured")
    command = [str(Path(sys.executable).with_name("workbench")), "tour", "--fast", "-o", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return Toured(folder, done.stdout)


@pytest.fixture
def executed_and_report(
    notebook: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook as it ran, and its report; the command's own for the tour."""
    if notebook == TOUR:
        toured: Toured = request.getfixturevalue("toured")
        return read(toured.folder / notebook.name), toured.report
    executed = run(notebook, tmp_path / notebook.name, {**TESTED, "out_dir": str(tmp_path / "out")})
    return read(executed), report(executed, tmp_path / "report.html")


def test_the_tour_is_there():
    assert TOUR in NOTEBOOKS


def test_the_tour_command_prints_last_where_its_report_is(toured: Toured):
    assert toured.report == toured.folder / "00_tour.html"
    assert toured.report.stat().st_size > 0


@each_notebook
def test_it_is_stored_normalized(notebook: Path):
    assert notebook.read_text(encoding="utf-8") == normalized_text(notebook), f"run: workbench normalize {notebook}"
    assert complaints(read(notebook)) == []


@each_notebook
def test_it_takes_the_common_parameters(notebook: Path):
    assert {"fast", "live", "seed", "device", "steps", "out_dir"} <= set(parameters(notebook))


@each_notebook
def test_it_runs_and_its_report_is_self_contained(
    executed_and_report: tuple[nbformat.NotebookNode, Path], browser: Browser
):
    executed, page_path = executed_and_report
    views = [
        cell for cell in executed.cells if cell.cell_type == "code" and re.search(r"^widgets\.", cell.source, re.M)
    ]
    assert "widget-view" not in page_path.read_text(encoding="utf-8")

    page = browser.new_context(offline=True).new_page()
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.figure-static')].every(e => e.hidden)")
    assert [url for url in requested if not url.startswith(("data:", "blob:"))] == [page_path.as_uri()]
    assert errors == []
    words = page.locator("main").inner_text().lower()
    assert "error displaying widget" not in words and "model not found" not in words
    figures = page.locator(".js-plotly-plot:visible, .jp-RenderedSVG:visible").all()
    assert len(figures) >= len(views)
    assert min(map(drawn, figures), default=1.0) > 0.01
    # Axes alone are drawn as well.
    data = [plot.locator(".trace, .hm, .table").count() for plot in page.locator(".js-plotly-plot").all()]
    assert all(data), data


def drawn(figure: Locator) -> float:
    """The share of its pixels that are not of its commonest colour: of a blank one 0."""
    pixels = matplotlib.image.imread(io.BytesIO(figure.screenshot()))
    _, counts = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0, return_counts=True)
    return 1 - counts.max() / counts.sum()


@each_notebook
def test_it_shows_what_it_stores(notebook: Path, tmp_path: Path):
    copy = read(notebook)
    (place,) = (i for i, cell in enumerate(copy.cells) if "parameters" in cell.metadata.get("tags", []))
    given = {**TESTED, "out_dir": str(tmp_path / "out")}
    copy.cells.insert(place + 1, new_code_cell("\n".join(f"{name} = {value!r}" for name, value in given.items())))
    nbformat.write(copy, tmp_path / notebook.name)
    (tmp_path / "conftest.py").write_text(COMPARE_TEXT_ALONE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--nbval",
            "--nbval-current-env",
            notebook.name,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
