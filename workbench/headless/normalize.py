"""The one form in which notebooks are stored: their text, and of their outputs what is equal on every machine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

_KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_LANGUAGE = {"name": "python"}
_KEPT_CELL_METADATA = ("editable", "deletable", "jupyter", "slideshow", "tags")
_KEPT_MIME_TYPES = ("text/latex", "text/markdown", "text/plain")
_PAPERMILL_CELLS = {"injected-parameters", "papermill-error-cell-tag"}

# What a text output must not hold, since it differs from machine to machine or from run to run.
_UNSTABLE = {
    "a path of one machine": re.compile(
        r"(?:^|[\s'\"(=:])(?:/(?:home|root|Users|tmp|var|private|mnt|opt)/|[A-Za-z]:\\)", re.MULTILINE
    ),
    "a memory address": re.compile(r"\bat 0x[0-9a-fA-F]{6,}"),
}


def normalize(notebook: NotebookNode) -> NotebookNode:
    """A copy without what differs between runs: timings, images, figures, widget state, tools' metadata.

    Applied twice it changes nothing more. Plain, Markdown and LaTeX text stays, so that a run can be compared with it;
    cells are numbered as one run from top to bottom numbers them.
    """
    cells = [_cell(cell) for cell in notebook.cells if not _PAPERMILL_CELLS & set(cell.metadata.get("tags", []))]
    _complete_ids(cells)
    _number(cells)
    return NotebookNode(
        cells=[nbformat.from_dict(cell) for cell in cells],
        metadata=nbformat.from_dict({"kernelspec": _KERNEL, "language_info": _LANGUAGE}),
        nbformat=4,
        nbformat_minor=5,
    )


def normalized_text(path: Path) -> str:
    """The text that the file at `path` holds once it is normalized.

    Raises:
        ValueError: there is no notebook at `path`.
    """
    return nbformat.writes(normalize(read(path))) + "\n"


def complaints(notebook: NotebookNode) -> list[str]:
    """What in the stored outputs no normalization can mend, one line each, by the cell's place from 1."""
    found: list[str] = []
    for number, cell in enumerate(notebook.cells, start=1):
        allowed = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "error" and not allowed:
                found.append(f"cell {number} stores the error {output.ename}: {output.evalue}")
            for text in _texts(output):
                found += [f"cell {number} stores {what}" for what, pattern in _UNSTABLE.items() if pattern.search(text)]
    return found


def read(path: Path) -> NotebookNode:
    """The notebook at `path`; cells without an id get one that depends on their place alone.

    Raises:
        ValueError: there is no file at `path`, or what it holds is no notebook of format 4.
    """
    if not path.is_file():
        raise ValueError(f"there is no notebook {path}")
    try:
        notebook = nbformat.v4.reads(path.read_text(encoding="utf-8"))
        notebook.nbformat_minor = 5
        _complete_ids(notebook.cells)
        nbformat.validate(notebook, version=4, version_minor=5, relax_add_props=True)
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a notebook: {_first_line(error)}") from None
    return notebook


def _complete_ids(cells: list[Any]) -> None:
    taken = {cell["id"] for cell in cells if "id" in cell}
    fresh = (name for number in itertools.count() if (name := f"cell-{number}") not in taken)
    for cell in cells:
        if "id" not in cell:
            cell["id"] = next(fresh)


def _number(cells: list[dict[str, Any]]) -> None:
    run = (cell for cell in cells if cell["cell_type"] == "code" and cell["source"].strip())
    for count, cell in enumerate(run, start=1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cell(cell: NotebookNode) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "cell_type": cell.cell_type,
        "metadata": _cell_metadata(cell.metadata),
        "source": cell.source,
    }
    if "id" in cell:
        kept["id"] = cell.id
    if cell.get("attachments"):
        kept["attachments"] = cell.attachments
    if cell.cell_type == "code":
        kept["execution_count"] = None
        kept["outputs"] = list(_outputs(cell.outputs))
    return kept


def _cell_metadata(metadata: NotebookNode) -> dict[str, Any]:
    return {key: metadata[key] for key in _KEPT_CELL_METADATA if metadata.get(key) not in (None, [], {})}


def _outputs(outputs: list[NotebookNode]) -> Iterator[dict[str, Any]]:
    """Standard output in one piece wherever nothing stands between, text of displays, errors without traceback."""
    said = ""
    for output in outputs:
        if output.output_type == "stream":
            said += output.text if output.name == "stdout" else ""
            continue
        kept = _output(output)
        if kept is None:
            continue
        if said:
            yield {"name": "stdout", "output_type": "stream", "text": said}
            said = ""
        yield kept
    if said:
        yield {"name": "stdout", "output_type": "stream", "text": said}


def _output(output: NotebookNode) -> dict[str, Any] | None:
    if output.output_type == "error":
        return {"ename": output.ename, "evalue": output.evalue, "output_type": "error", "traceback": []}
    data = {mime: output.data[mime] for mime in _KEPT_MIME_TYPES if mime in output.data}
    if not data:
        return None
    kept: dict[str, Any] = {"data": data, "metadata": {}, "output_type": output.output_type}
    if output.output_type == "execute_result":
        kept["execution_count"] = None
    return kept


def _texts(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield output.evalue
    else:
        yield from (text for mime, text in output.data.items() if mime in _KEPT_MIME_TYPES)
