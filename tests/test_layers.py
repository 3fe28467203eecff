"""The way of the data has one direction: which room may import what, read off every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("workbench", "workbench_kernels")


@dataclass(frozen=True)
class Layer:
    """The files below `path` may import `ours` (prefixes of module names) and `theirs`, beside themselves and stdlib.

    `exceptions` gives single files or folders below `path` further packages.
    """

    path: str
    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    exceptions: tuple[tuple[str, tuple[str, ...]], ...] = ()


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(name if name == "workbench_kernels" else f"workbench.{name}" for name in names)


LAYERS = (
    Layer("kernels/workbench_kernels", theirs=("torch",), exceptions=(("fused", ("triton",)),)),
    Layer("workbench/field_types.py"),
    Layer("workbench/text", rooms("field_types"), theirs=("numpy", "tokenizers", "pyarrow")),
    Layer("workbench/blocks", rooms("workbench_kernels"), ("torch", "jaxtyping")),
    Layer(
        "workbench/model", rooms("workbench_kernels", "field_types", "blocks"), ("torch", "safetensors", "jaxtyping")
    ),
    Layer(
        "workbench/train",
        rooms("workbench_kernels", "field_types", "text", "blocks", "model"),
        ("torch", "jaxtyping", "numpy"),
    ),
    Layer(
        "workbench/record",
        rooms("model.config", "train.events"),
        ("pyarrow", "duckdb", "numpy"),
        exceptions=(("checkpoint.py", ("torch", "safetensors")),),
    ),
    Layer("workbench/live", rooms("text", "model", "train", "record"), ("torch",)),
    Layer(
        "workbench/analysis",
        rooms("text", "model", "record"),
        ("numpy", "pandas", "duckdb"),
        exceptions=(("probe.py", ("torch",)),),
    ),
    Layer(
        "workbench/widgets",
        rooms("analysis", "record"),
        ("anywidget", "ipywidgets", "plotly", "matplotlib", "numpy", "pandas", "IPython", "traitlets"),
    ),
    Layer(
        "workbench/headless",
        rooms("record", "analysis"),
        ("papermill", "nbclient", "nbconvert", "nbformat", "jupyter_client", "traitlets", "dask"),
    ),
    Layer("workbench/lessons", rooms("workbench_kernels", "text", "blocks", "model", "train", "analysis"), ("torch",)),
    Layer("workbench/doctor.py"),
)

# These two may import anything of ours: the lazy names, and the command.
UNBOUND = {"workbench/__init__.py", "workbench/cli.py"}

TORCH_FREE = (
    "workbench",
    "workbench.doctor",
    "workbench.text",
    "workbench.model.config",
    "workbench.model.count",
    "workbench.train.events",
    "workbench.record",
    "workbench.analysis",
    "workbench.widgets",
)

TOP_LEVEL = {
    *("pyproject.toml", "workbench", "kernels", "notebooks", "data", "tests"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"),
    *(".ci", ".gitignore", ".gitattributes", ".pre-commit-config.yaml"),
}


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and full module name of every import: at the top, inside functions, for types only, or by name."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from workbench import live` names a room just as `import workbench.live` does.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            literal = node.args[0] if node.args else None
            said = literal.value if isinstance(literal, ast.Constant) else "a name that is computed"
            found.append((node.lineno, str(said)))
    return found


def violations(layer: Layer, file: str, source: str) -> list[str]:
    """The imports in `source`, standing at `file`, that `layer` does not allow."""
    home = layer.path.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
    package = str(Path(file).parent).removeprefix("kernels/").replace("/", ".")
    inside = file.removeprefix(layer.path + "/")
    theirs = {*layer.theirs, *sys.stdlib_module_names}
    for place, further in layer.exceptions:
        if inside == place or inside.startswith(place + "/"):
            theirs |= set(further)

    def allowed(module: str) -> bool:
        if module.split(".")[0] in OURS:
            return any(module == prefix or module.startswith(prefix + ".") for prefix in (home, *layer.ours))
        return module.split(".")[0] in theirs

    return [f"{file}:{line} imports {name}" for line, name in imports(source, package) if not allowed(name)]


def source_files() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for folder in ("workbench", "kernels/workbench_kernels")
        for path in (ROOT / folder).rglob("*.py")
    )


def layer_of(file: str) -> Layer | None:
    return next((layer for layer in LAYERS if file == layer.path or file.startswith(layer.path + "/")), None)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.path)
def test_a_room_imports_only_what_it_may(layer: Layer):
    files = [file for file in source_files() if layer_of(file) is layer]
    found = [line for file in files for line in violations(layer, file, (ROOT / file).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_every_source_file_is_in_a_room():
    assert [file for file in source_files() if layer_of(file) is None and file not in UNBOUND] == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("workbench/text/x.py", "import torch", "torch"),
        ("workbench/text/x.py", "def f():\n    import torch.nn", "torch.nn"),
        ("workbench/text/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "torch"),
        ("workbench/text/x.py", "import importlib\nimportlib.import_module('torch')", "torch"),
        ("workbench/text/x.py", "from importlib import import_module\nimport_module('torch')", "torch"),
        ("workbench/text/x.py", "import importlib as i\ni.import_module('torch')", "torch"),
        ("workbench/text/x.py", "import importlib\nname = 'torch'\nimportlib.import_module(name)", "computed"),
        ("workbench/blocks/x.py", "from workbench import model", "workbench.model"),
        ("workbench/blocks/x.py", "from ..model import config", "workbench.model.config"),
        ("workbench/record/x.py", "from workbench.model.decoder import Decoder", "workbench.model.decoder"),
        ("workbench/record/x.py", "import torch", "torch"),
        ("workbench/analysis/x.py", "import torch", "torch"),
        ("workbench/widgets/x.py", "import workbench.live", "workbench.live"),
        ("workbench/doctor.py", "import numpy", "numpy"),
        ("kernels/workbench_kernels/x.py", "import triton", "triton"),
        ("kernels/workbench_kernels/x.py", "from jaxtyping import Float", "jaxtyping.Float"),
        ("kernels/workbench_kernels/x.py", "import workbench", "workbench"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str, complaint: str):
    layer = layer_of(file)
    assert layer is not None
    found = violations(layer, file, source)
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("workbench/text/x.py", "import json\nfrom workbench.text import y\nfrom . import z\nimport numpy as np"),
        ("workbench/record/checkpoint.py", "import torch\nfrom safetensors.torch import save_file"),
        ("workbench/record/x.py", "from workbench.train.events import Step"),
        ("kernels/workbench_kernels/fused/x.py", "import triton.language as tl\nimport workbench_kernels.x"),
    ],
)
def test_an_allowed_import_is_not(file: str, source: str):
    layer = layer_of(file)
    assert layer is not None
    assert violations(layer, file, source) == []


def test_what_must_not_load_torch_does_not():
    def loaded(module: str) -> str:
        code = f"import sys, {module}; print({module!r} if 'torch' in sys.modules else '')"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else f"{module}: {done.stderr.strip().splitlines()[-1]}"

    with ThreadPoolExecutor(max_workers=2) as pool:
        assert [said for said in pool.map(loaded, TORCH_FREE) if said] == []


def test_importing_workbench_loads_nothing_heavy():
    code = """
import sys
import workbench
heavy = {"torch", "plotly", "numpy", "pandas", "matplotlib", "IPython"} & set(sys.modules)
assert not heavy, heavy
rooms = {name for name in sys.modules if name.startswith("workbench.")}
assert not rooms, rooms
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_the_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in tracked.split("\0") if name} <= TOP_LEVEL


def test_kernels_is_a_source_root_and_no_package():
    assert list((ROOT / "kernels").glob("*.py")) == []
