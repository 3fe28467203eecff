"""A folder that appears whole or not at all, and stays after a power cut."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder beside `final` to write into; force it to the disk and rename it when the body is done.

    What the body raises leaves neither folder behind. Folders that killed writers of the same name left are deleted.

    Raises:
        ValueError: there is something at `final`, which is left as it is.
    """
    if os.path.lexists(final):
        raise ValueError(f"{final} exists already; give the name of a folder that does not")
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
        shutil.rmtree(left)
    building = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex}")
    try:
        building.mkdir()
        yield building
        for path in building.iterdir():
            _force(path, os.O_RDWR)
        _force_names(building)
        os.rename(building, final)
        _force_names(final.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _force_names(folder: Path) -> None:
    """Force the names in a folder to the disk. Windows has no such call; there the file system's journal must do."""
    if os.name != "nt":
        _force(folder, os.O_RDONLY)


def _force(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
