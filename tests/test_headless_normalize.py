"""Normalized notebooks hold text alone, and normalizing them again changes nothing."""

from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbench.headless import complaints, normalize, normalized_text, read

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"

TEXTS = st.sampled_from(["", "a", "a\n", "x = 1\ny", "é→"])
TAGS = st.lists(st.sampled_from(["parameters", "injected-parameters", "keep"]), max_size=2, unique=True)
NOISE = st.sampled_from([{}, {"papermill": {"duration": 1.0}}, {"collapsed": True, "jupyter": {"source_hidden": True}}])
MIMES = st.sampled_from(["text/plain", "text/html", "image/png", "image/svg+xml", WIDGET])
OUTPUTS = st.one_of(
    st.fixed_dictionaries(
        {"output_type": st.just("stream"), "name": st.sampled_from(["stdout", "stderr"]), "text": TEXTS}
    ),
    st.fixed_dictionaries(
        {
            "output_type": st.sampled_from(["display_data", "execute_result"]),
            "data": st.dictionaries(MIMES, TEXTS, max_size=2),
            "metadata": st.just({"x": 1}),
        }
    ),
    st.fixed_dictionaries(
        {"output_type": st.just("error"), "ename": TEXTS, "evalue": TEXTS, "traceback": st.lists(TEXTS, max_size=1)}
    ),
)


@st.composite
def notebooks(draw: st.DrawFn) -> NotebookNode:
    cells = []
    for number in range(draw(st.integers(0, 3))):
        metadata = {**draw(NOISE), "tags": draw(TAGS)}
        cell = {"id": f"id-{number}", "metadata": metadata, "source": draw(TEXTS), "cell_type": "markdown"}
        if draw(st.booleans()):
            cell |= {"cell_type": "code", "outputs": draw(st.lists(OUTPUTS, max_size=3))}
            cell["execution_count"] = draw(st.sampled_from([None, 7]))
        cells.append(nbformat.from_dict(cell))
    metadata = nbformat.from_dict(draw(st.sampled_from([{}, {"papermill": {}, "widgets": {"a": 1}}])))
    return NotebookNode(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)


@settings(max_examples=40)
@given(notebooks())
def test_normalizing_twice_is_normalizing_once(notebook: NotebookNode):
    once = normalize(notebook)
    assert normalize(once) == once
    nbformat.validate(once)


@settings(max_examples=40)
@given(notebooks())
def test_sources_stay_and_nothing_but_text_is_left_of_outputs(notebook: NotebookNode):
    kept = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    result = normalize(notebook)
    assert [cell.source for cell in result.cells] == [cell.source for cell in kept]
    assert [cell.id for cell in result.cells] == [cell.id for cell in kept]
    for cell in result.cells:
        assert set(cell.metadata) <= {"tags", "jupyter"}
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr"
            assert set(output.get("data", {})) <= {"text/plain", "text/markdown", "text/latex"}
            assert output.get("traceback", []) == []


def test_a_known_notebook():
    shown = {"text/plain": "a figure", "image/svg+xml": "<svg/>", PLOTLY: {"data": []}}
    notebook = new_notebook(
        cells=[
            new_code_cell("steps = 1", metadata={"tags": ["parameters"], "papermill": {"duration": 1.0}}),
            new_code_cell("steps = 2", metadata={"tags": ["injected-parameters"]}),
            new_code_cell(
                "work()",
                execution_count=7,
                outputs=[
                    new_output("stream", name="stdout", text="a\n"),
                    new_output("stream", name="stderr", text="warning: /some/where\n"),
                    new_output("stream", name="stdout", text="b\n"),
                    new_output("display_data", data=shown),
                    new_output("display_data", data={"image/png": "xx"}),
                ],
            ),
        ],
        metadata={"papermill": {}, "widgets": {}, "kernelspec": {"name": "mine", "display_name": "Mine"}},
    )
    result = normalize(notebook)
    assert [cell.source for cell in result.cells] == ["steps = 1", "work()"]
    assert result.cells[0].metadata == {"tags": ["parameters"]}
    assert [cell.execution_count for cell in result.cells] == [1, 2]
    stream, figure = result.cells[1].outputs
    assert stream.text == "a\nb\n"
    assert figure.data == {"text/plain": "a figure"}
    assert result.metadata.kernelspec.name == "python3" and set(result.metadata) == {"kernelspec", "language_info"}


def test_the_given_notebook_is_not_changed():
    notebook = new_notebook(cells=[new_code_cell("1", execution_count=3, metadata={"papermill": {}})])
    before = nbformat.writes(notebook)
    normalize(notebook)
    assert nbformat.writes(notebook) == before


def test_cells_without_an_id_get_one_by_their_place(tmp_path: Path):
    path = tmp_path / "old.ipynb"
    notebook = new_notebook(cells=[new_markdown_cell("a"), new_markdown_cell("b")])
    notebook.nbformat_minor = 4
    for cell in notebook.cells:
        del cell["id"]
    nbformat.write(notebook, path)
    assert [cell.id for cell in read(path).cells] == ["cell-0", "cell-1"]
    assert normalized_text(path) == normalized_text(path)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (new_output("stream", name="stdout", text="saved to /home/me/x"), "a path of one machine"),
        (new_output("stream", name="stdout", text="a\n/tmp/x"), "a path of one machine"),
        (new_output("display_data", data={"text/plain": "PosixPath('/root/runs')"}), "a path of one machine"),
        (new_output("execute_result", data={"text/plain": "<A object at 0x7f00deadbeef>"}), "a memory address"),
        (new_output("error", ename="ValueError", evalue="no"), "ValueError: no"),
    ],
)
def test_outputs_that_no_other_machine_would_show_are_named(output: NotebookNode, said: str):
    notebook = new_notebook(cells=[new_markdown_cell("x"), new_code_cell("y", outputs=[output])])
    (line,) = complaints(notebook)
    assert line.startswith("cell 2 stores") and said in line


def test_a_ratio_and_an_expected_error_are_no_complaint():
    output = [new_output("stream", name="stdout", text="3/4 of the tokens, code/prose, 1 / tmp")]
    failing = new_code_cell("1/0", outputs=[new_output("error", ename="E", evalue="x")])
    failing.metadata["tags"] = ["raises-exception"]
    assert complaints(new_notebook(cells=[new_code_cell("y", outputs=output), failing])) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", "no json", '{"nbformat": 4, "cells": [{}]}', '{"nbformat": 3}'])
def test_what_is_no_notebook_is_one_clear_line(tmp_path: Path, content: str):
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.ipynb is not a notebook: .+$") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no notebook"):
        read(tmp_path / "absent.ipynb")
