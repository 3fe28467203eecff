"""Every notebook runs, in fast mode and without a screen, and shows what it stores.

Stored outputs are those of `fast=True, live=False`, whatever the notebook's own parameters are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from workbench.headless import complaints, normalized_text, parameters, read, report, run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TESTED = {"fast": True, "live": False}

# nbval compares every form of an output that it does not know to be volatile; stored are the text forms alone.
COMPARE_TEXT_ALONE = """
def pytest_collection_modifyitems(items):
    for item in items:
        drawn = ("application/vnd.plotly.v1+json", "image/svg+xml", "text/html")
        item.parent.skip_compare = (*item.parent.skip_compare, *drawn)
"""

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_tour_is_there():
    assert ROOT / "notebooks" / "00_tour.ipynb" in NOTEBOOKS


@each_notebook
def test_it_is_stored_normalized(notebook: Path):
    assert notebook.read_text(encoding="utf-8") == normalized_text(notebook), f"run: workbench normalize {notebook}"
    assert complaints(read(notebook)) == []


@each_notebook
def test_it_takes_the_common_parameters(notebook: Path):
    assert {"fast", "live", "seed", "device", "steps", "out_dir"} <= set(parameters(notebook))


@each_notebook
def test_it_runs_and_its_report_is_self_contained(notebook: Path, tmp_path: Path):
    executed = run(notebook, tmp_path / notebook.name, {**TESTED, "out_dir": str(tmp_path / "out")})
    assert report(executed, tmp_path / "report.html").stat().st_size > 0


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
