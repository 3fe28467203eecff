"""Where the checkpoints of a run lie. What is in them is `checkpoint`'s, which needs torch."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from workbench.record.durable import fsync_folder

FOLDER_NAME = "checkpoints"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step-([0-9]{9,})")


def step_folder(folder: Path, step: int) -> Path:
    """The committed checkpoint of a step."""
    return folder / FOLDER_NAME / f"step-{step:09d}"


def temporary_folder(folder: Path) -> Path:
    """A new name that counts as no checkpoint and that `sweep_temporary` deletes."""
    return folder / FOLDER_NAME / f"{_TEMPORARY}{uuid.uuid4().hex}"


def steps(folder: Path) -> list[int]:
    """The steps of all committed checkpoints, oldest first."""
    root = folder / FOLDER_NAME
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def delete(folder: Path, step: int) -> None:
    """Delete a checkpoint; killed half-way it is gone all the same."""
    doomed = temporary_folder(folder)
    os.rename(step_folder(folder, step), doomed)
    fsync_folder(doomed.parent)
    shutil.rmtree(doomed)


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps and what killed savers left."""
    for later in steps(folder):
        if later > step:
            delete(folder, later)
    sweep_temporary(folder)


def sweep_temporary(folder: Path) -> None:
    """Delete what killed savers left; they leave full-size folders."""
    for path in (folder / FOLDER_NAME).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)
