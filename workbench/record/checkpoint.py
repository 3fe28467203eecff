"""Checkpoints: named tensors and plain values of one step, whole and verified.

A checkpoint is a folder with `state.safetensors`, `state.json` and `manifest.json`, which holds the size and sha256 of
the other two. It is written under a temporary name, forced to the disk and then renamed; when `save` returns it is
there to stay. Nothing is pickled. Commit the run's record before (`RunWriter.write(Checkpoint)` does): it must never be
behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.record.checkpoint_folders import (
    FOLDER_NAME,
    delete,
    step_folder,
    steps,
    sweep_temporary,
    temporary_folder,
)
from workbench.record.durable import fsync_file, fsync_folder, write_file
from workbench.record.plain_json import dumps, loads

_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(
    folder: str | Path, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Save a checkpoint of `step` in a run folder and delete all but the newest `keep`.

    `values` round-trips as `plain_json` says: floats exactly, NaN and infinities included.

    Raises:
        ValueError: there is a checkpoint of that step, `keep` is below 1, or a value is no plain JSON.
        OSError: the disk is full or broken; older checkpoints are as they were and nothing of this one is left.
    """
    folder = Path(folder)
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1")
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    final = step_folder(folder, step)
    if final.exists():
        raise ValueError(f"there is a checkpoint of step {step} already: {final}")
    values_json = dumps(dict(values)).encode()
    final.parent.mkdir(exist_ok=True)
    sweep_temporary(folder)
    building = temporary_folder(folder)
    try:
        building.mkdir()
        save_file(_separate(tensors), building / _TENSORS)
        fsync_file(building / _TENSORS)
        write_file(building / _VALUES, values_json)
        write_file(building / _MANIFEST, _manifest(building, step))
        fsync_folder(building)
        os.rename(building, final)
        fsync_folder(final.parent)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(_unsaved_line(folder, step, error)) from error
        raise
    for old in steps(folder)[:-keep]:
        delete(folder, old)
    return final


def latest(folder: str | Path) -> int | None:
    """The step of the newest checkpoint; None when there is none."""
    return max(steps(Path(folder)), default=None)


def load(
    folder: str | Path, step: int | None = None, *, prefixes: tuple[str, ...] = ("",)
) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    """Step, tensors (on the CPU) and values of the newest checkpoint, or of that of `step`, after verifying every byte.

    Only tensors whose name begins with one of `prefixes` are loaded.

    Raises:
        ValueError: there is no such checkpoint or it is damaged; the line says how, and which others there are. Another
            one is never loaded instead.
    """
    folder = Path(folder)
    known = steps(folder)
    if not known:
        raise ValueError(f"{folder / FOLDER_NAME} holds no checkpoint")
    step = known[-1] if step is None else step
    others = ", ".join(str(other) for other in known if other != step) or "none"
    if step not in known:
        raise ValueError(f"there is no checkpoint of step {step} in {folder}; there are {others}")
    path = step_folder(folder, step)
    damage = _damage(path, step)
    if damage is not None:
        raise ValueError(f"the checkpoint {path} is damaged: {damage}; checkpoints of other steps: {others}")
    with safe_open(path / _TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    return step, tensors, loads((path / _VALUES).read_bytes())


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory, as the format demands."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _manifest(folder: Path, step: int) -> bytes:
    """The manifest of the files in `folder`; it ends with the sha256 of itself."""
    files = {}
    for name in (_TENSORS, _VALUES):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    content = {"step": step, "files": files}
    return dumps({**content, "sha256": hashlib.sha256(dumps(content).encode()).hexdigest()}).encode()


def _damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is as written."""
    written = _read_manifest(folder / _MANIFEST)
    if isinstance(written, str):
        return written
    if written["step"] != step:
        return f"{_MANIFEST} is that of step {written['step']}"
    for name, facts in written["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
        if _sha256(path) != facts["sha256"]:
            return f"{name} has another sha256 than was written"
    return None


def _read_manifest(path: Path) -> dict[str, Any] | str:
    """The verified manifest, or what is wrong with it."""
    if not path.is_file():
        return f"{path.name} is missing"
    text = path.read_bytes()
    try:
        written = loads(text)
        content = {"step": written["step"], "files": written["files"]}
        expected = {**content, "sha256": hashlib.sha256(dumps(content).encode()).hexdigest()}
        unchanged = dumps(expected).encode() == text
    except (ValueError, KeyError, TypeError):
        unchanged = False
    return written if unchanged else f"{path.name} is not as it was written"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unsaved_line(folder: Path, step: int, error: BaseException) -> str:
    newest = latest(folder)
    kept = "there is none yet" if newest is None else f"the newest is still that of step {newest}"
    return f"the checkpoint of step {step} could not be written in {folder}: {error}; {kept}"
