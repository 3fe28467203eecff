"""The runs below a root: list, rename, delete."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from workbench.record.database import FILE_NAME, connect, read_meta, read_status
from workbench.record.names import checked_path, validate_name
from workbench.record.ownership import Claim, effective_state

_UNFINISHED = (".creating-*", ".deleting-*")
_ABANDONED_S = 3600


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run at a glance.

    `status` is that of a `Snapshot`, or "unreadable" for a damaged folder or one of another version, whose steps are 0
    and whose `started` is None. `disk_bytes` counts every file.
    """

    name: str
    folder: Path
    status: str
    step: int
    total_steps: int
    disk_bytes: int
    started: datetime | None


def runs(root: str | Path) -> list[RunInfo]:
    """Every run directly below `root`, oldest first; none when there is no such folder. Links are not followed."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if not path.is_symlink() and (path / FILE_NAME).is_file()]
    found = [_info(folder) for folder in folders if not folder.name.startswith(".")]
    return sorted(found, key=lambda run: (run.started.isoformat() if run.started else "", run.name))


def rename(root: str | Path, old: str, new: str) -> Path:
    """Give a run another name.

    Raises:
        ValueError: there is no run `old`, it is being written, or `new` is taken or not allowed.
    """
    folder, renamed = _existing(root, old), validate_name(root, new)
    claim = _claimed(folder)
    moved = False
    try:
        os.rename(folder, renamed)
        moved = True
    finally:
        with closing(connect(renamed if moved else folder, "rw")) as connection:
            claim.release(connection)
    return renamed


def delete(root: str | Path, name: str) -> None:
    """Delete a run and everything in its folder. Links in it are deleted, not followed.

    Raises:
        ValueError: there is no run of that name, or it is being written.
    """
    folder = _existing(root, name)
    doomed = folder.with_name(f".deleting-{uuid.uuid4().hex}")
    # Held until the folder is gone, so that nobody starts to write it.
    claim = _claimed(folder)
    try:
        os.rename(folder, doomed)
    except OSError:
        with closing(connect(folder, "rw")) as connection:
            claim.release(connection)
        raise
    shutil.rmtree(doomed)
    sweep(Path(root))


def sweep(root: Path) -> None:
    """Delete what a killed `create` or `delete` left behind an hour ago or earlier."""
    for pattern in _UNFINISHED:
        for path in root.glob(pattern):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path)


def _existing(root: str | Path, name: str) -> Path:
    folder = checked_path(root, name)
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, not a run folder")
    if not (folder / FILE_NAME).is_file():
        raise ValueError(f"there is no run {name!r} in {root}")
    return folder


def _claimed(folder: Path) -> Claim:
    with closing(connect(folder, "rw")) as connection:
        return Claim(connection, folder)


def _info(folder: Path) -> RunInfo:
    try:
        with closing(connect(folder, "ro")) as connection:
            status, meta, state = read_status(connection), read_meta(connection), effective_state(connection)
            started = datetime.fromisoformat(meta.created)
    except (ValueError, TypeError, OverflowError):
        # A damaged cell can hold a value of any type.
        facts = {"status": "unreadable", "step": 0, "total_steps": 0, "started": None}
        return RunInfo(name=folder.name, folder=folder, disk_bytes=_disk_bytes(folder), **facts)
    return RunInfo(
        name=folder.name,
        folder=folder,
        status=state,
        step=status.step,
        total_steps=status.total_steps,
        disk_bytes=_disk_bytes(folder),
        started=started,
    )


def _disk_bytes(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                # The run is being written: a segment has just been replaced.
                continue
    return total
