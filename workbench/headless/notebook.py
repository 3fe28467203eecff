"""Run a notebook from top to bottom with parameters, in a kernel of its own."""

from __future__ import annotations

import ast
import keyword
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets import default
from traitlets.config import Config

from workbench.headless.normalize import read

Value = bool | int | float | str | None | list[Any] | dict[str, Any]


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died; `partial` is the notebook as far as it came."""

    def __init__(self, message: str, partial: Path) -> None:
        super().__init__(f"{message}; the notebook up to there is {partial}")
        self.partial = partial


def run(notebook: Path | str, out: Path | str, parameters: Mapping[str, Value] | None = None) -> Path:
    """Execute `notebook` with `parameters` in place of its own, write the result to `out`, and return that path.

    The kernel is this very Python, whatever kernels are installed, and starts in the present working directory.
    `out` appears when the last cell has succeeded and never holds half a run. Safe to call from several threads.

    Raises:
        ValueError: `notebook` cannot be read, `out` is no `.ipynb` file, or a parameter is unknown or of another type
            than the notebook's own.
        NotebookFailed: a cell raised, or the kernel died.
    """
    source, target = _local_path(notebook), _local_path(out)
    if target.suffix != ".ipynb":
        raise ValueError(f"out={str(out)!r} must end in .ipynb")
    opened = read(source)
    given = dict(parameters or {})
    _check(given, _defaults(opened), source)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.ipynb")
    with tempfile.TemporaryDirectory(prefix="wb") as sockets:
        try:
            papermill.execute_notebook(
                opened,
                str(partial).replace("{", "{{").replace("}", "}}"),  # papermill takes it for a template
                given,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                store_widget_state=False,
                kernel_manager_class=_KernelManager,
                config=_connection(Path(sockets)),
            )
        except PapermillExecutionError as error:
            place = _place(opened, error.cell_index, injected=bool(given))
            said = " ".join(error.evalue.split())
            raise NotebookFailed(f"{source.name}, cell {place}: {error.ename}: {said}", partial) from None
        except DeadKernelError:
            raise NotebookFailed(f"{source.name}: the kernel died", partial) from None
    os.replace(partial, target)
    return target


def _place(notebook: NotebookNode, index: int, *, injected: bool) -> int:
    """Place from 1, in the notebook as it was written, of a cell of the executed one.

    papermill injects a cell of its own behind the `parameters` cell.
    """
    before = next((i for i, cell in enumerate(notebook.cells) if _is_parameters(cell)), index)
    return index + 1 - int(injected and index > before)


def _is_parameters(cell: NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def parameters(notebook: Path | str) -> dict[str, Value]:
    """Names and values of the notebook's `parameters` cell; empty without one.

    Raises:
        ValueError: there is no notebook, or a line of that cell is not `name = literal`.
    """
    return _defaults(read(_local_path(notebook)))


def _local_path(path: Path | str) -> Path:
    """`path`, unless papermill would fetch it over the network."""
    if "://" in str(path):
        raise ValueError(f"{str(path)!r} must be a local path")
    return Path(path)


def _defaults(notebook: NotebookNode) -> dict[str, Value]:
    cells = [cell for cell in notebook.cells if _is_parameters(cell)]
    if len(cells) > 1:
        raise ValueError(f"{len(cells)} cells are tagged `parameters`; there may be one")
    try:
        statements = ast.parse(cells[0].source).body if cells else []
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        line = error.text if isinstance(error, SyntaxError) and error.text else cells[0].source[:80]
        raise ValueError(f"the parameters cell may hold only `name = literal`, not `{line.strip()}`") from None
    return dict(_assignment(statement) for statement in statements if not _is_docstring(statement))


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _assignment(statement: ast.stmt) -> tuple[str, Value]:
    target, value = None, None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign):
        target, value = statement.target, statement.value
    if not isinstance(target, ast.Name) or value is None:
        raise ValueError(f"the parameters cell may hold only `name = literal`, not `{ast.unparse(statement)}`")
    try:
        return target.id, ast.literal_eval(value)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"parameter {target.id} must be a literal, not `{ast.unparse(value)}`") from None


def _check(given: Mapping[str, Any], known: Mapping[str, Any], source: Path) -> None:
    for name, value in given.items():
        # papermill writes names into code as they are.
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"parameter name {name!r} must be a Python identifier")
        if name not in known:
            raise ValueError(f"{source.name} has no parameter {name!r}; it has: {', '.join(sorted(known)) or 'none'}")
        if not _fits(value, known[name]):
            wanted = type(known[name]).__name__
            raise ValueError(f"{name}={value!r} must be of type {wanted}, as its default {known[name]!r} is")


def _fits(value: Any, default: Any) -> bool:
    if not isinstance(value, bool | int | float | str | list | dict | None):
        return False
    if value is None or default is None:
        return True
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


class _ThisPython(KernelSpecManager):
    """Knows one kernel: the running interpreter's, whatever kernels are installed on this machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name="Python 3 (ipykernel)", language="python", name=kernel_name)


class _KernelManager(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _this_python(self) -> KernelSpecManager:
        return _ThisPython(parent=self)


def _connection(sockets: Path) -> Config:
    """The kernel talks over files in `sockets`: there is no port that another kernel could take first.

    The folder's path must be short: a socket's name has about 100 bytes. Windows has no such sockets.
    """
    settings = {"connection_file": str(sockets / "kernel.json")}
    return Config(AsyncKernelManager={**settings, "transport": "ipc"} if os.name == "posix" else settings)
