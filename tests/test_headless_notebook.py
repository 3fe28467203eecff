"""Notebooks run from top to bottom with parameters, under rules that keep machine and results safe."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workbench.headless import NotebookFailed, parameters, run

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def write(path: Path, *sources: str, first: str = 'fast = False\nsteps: int = 3\nname = "a"\nrate = 0.5') -> Path:
    cells = [new_markdown_cell("# Title"), new_code_cell(first, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=[*cells, *map(new_code_cell, sources)]), path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_parameters_replace_the_notebooks_own_and_the_kernel_is_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Someone else's kernel of the usual name, as a home may well hold one, is not used; no port is opened.
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": ["/no/such/python"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    source = write(
        tmp_path / "source.ipynb",
        "import sys, os, ipywidgets\nfrom IPython import get_ipython\n"
        "print(fast, steps, repr(name), rate, sys.executable, os.getcwd())\n"
        "print(get_ipython().kernel.parent.transport)",
        "ipywidgets.IntSlider()",
    )
    before = source.read_text()
    name = "'); import os  # \n"
    out = run(source, tmp_path / "new" / "{odd}.ipynb", {"steps": 7, "name": name, "rate": 1})
    said = f"False 7 {name!r} 1 {sys.executable} {os.getcwd()}"
    transport = "ipc" if os.name == "posix" else "tcp"
    assert printed(out) == f"{said}\n{transport}\n"
    assert [path.name for path in out.parent.iterdir()] == ["{odd}.ipynb"]
    assert WIDGET_STATE not in out.read_text()
    assert source.read_text() == before


def test_a_failing_cell_is_one_line_and_leaves_the_notebook_up_to_there(tmp_path: Path):
    source = write(tmp_path / "bad.ipynb", "print('reached')", "raise KeyError('the\\nkey')", "print('never')")
    out = tmp_path / "out.ipynb"
    with pytest.raises(NotebookFailed, match=r"bad\.ipynb, cell 4: KeyError: .*key") as caught:
        run(source, out, {"steps": 1})
    assert "\n" not in str(caught.value) and str(caught.value.partial) in str(caught.value)
    assert printed(caught.value.partial) == "reached\n"
    assert not out.exists()


def test_a_failure_keeps_an_earlier_result_and_a_dead_kernel_is_a_failure(tmp_path: Path):
    source = write(tmp_path / "bad.ipynb", "import os\nos._exit(1)")
    out = tmp_path / "out.ipynb"
    out.write_text("earlier")
    with pytest.raises(NotebookFailed, match="the kernel died"):
        run(source, out)
    assert out.read_text() == "earlier"


def test_runs_side_by_side_in_threads_do_not_mix(tmp_path: Path):
    source = write(tmp_path / "source.ipynb", "print(steps)")
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda n: run(source, tmp_path / f"{n}.ipynb", {"steps": n}), range(2)))
    assert [printed(out) for out in outs] == ["0\n", "1\n"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stepz": 3}, "has no parameter 'stepz'; it has: fast, name, rate, steps"),
        ({"steps": "3"}, "steps='3' must be of type int, as its default 3 is"),
        ({"steps": True}, "steps=True must be of type int"),
        ({"fast": 1}, "fast=1 must be of type bool"),
        ({"rate": True}, "rate=True must be of type float"),
        ({"name": Path("x")}, "must be of type str"),
        ({"x = 1\nimport os": 3}, "must be a Python identifier"),
        ({"lambda": 3}, "must be a Python identifier"),
    ],
)
def test_a_wrong_parameter_is_one_line_and_starts_no_kernel(tmp_path: Path, given: dict, said: str):
    source = write(tmp_path / "source.ipynb", "open('started', 'w')")
    with pytest.raises(ValueError) as caught:
        run(source, tmp_path / "out.ipynb", given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.ipynb", "s3://bucket/x.ipynb", "file:///x.ipynb"])
def test_no_address_is_ever_fetched_or_written(tmp_path: Path, address: str):
    source = write(tmp_path / "source.ipynb")
    for notebook, out in ((address, tmp_path / "out.ipynb"), (source, address)):
        with pytest.raises(ValueError, match="must be a local path"):
            run(notebook, out)


def test_out_must_be_a_notebook(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in \.ipynb"):
        run(write(tmp_path / "source.ipynb"), tmp_path / "out.html")


def test_parameters_are_read_and_not_run(tmp_path: Path):
    path = write(
        tmp_path / "x.ipynb", first='"""What to vary."""\nfast = True  # quickly\nsteps: int | None = None\nlr = -1e-3'
    )
    assert parameters(path) == {"fast": True, "steps": None, "lr": -1e-3}


@pytest.mark.parametrize(
    "line",
    [
        *("import os", "steps = open('x')", "a = b = 1", "steps += 1", "%matplotlib inline", "steps = 3\n!ls", "a ="),
        *("d = {[]: 1}", "d = {{}}", pytest.param("d = " + "-" * 5000 + "1", id="deep")),
    ],
)
def test_a_parameters_cell_holds_literals_only(tmp_path: Path, line: str):
    with pytest.raises(ValueError, match="literal") as caught:
        parameters(write(tmp_path / "x.ipynb", first=line))
    assert "\n" not in str(caught.value)


def test_a_notebook_without_parameters_takes_none(tmp_path: Path):
    path = tmp_path / "x.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), path)
    with pytest.raises(ValueError, match="it has: none"):
        run(path, tmp_path / "out.ipynb", {"fast": True})
