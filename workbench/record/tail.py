"""A run read from its folder, while it is written by any process or long after."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from workbench.record.arrays import list_segments, read_step
from workbench.record.database import connect, naming_damage, read_meta
from workbench.record.ownership import effective_state
from workbench.record.replay import Replay
from workbench.record.snapshot import LIVE_STATES, Snapshot, Source


class Tail:
    """Snapshots of a run folder; each call reads only what was committed since the last.

    No file stays open between calls, so the run can be renamed or deleted meanwhile; the next call then says so.

    Raises:
        ValueError: the folder is no run folder, or not one that this version reads.
    """

    live = False

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        with naming_damage(self._folder), closing(connect(self._folder, "ro")) as connection:
            self._replay = Replay(connection, self._folder)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder

    def snapshot(self) -> Snapshot:
        """The newest committed state. Calls the observers when it is the first that shows the end."""
        with self._lock:
            with naming_damage(self._folder), closing(connect(self._folder, "ro")) as connection:
                while not self._replay.update(connection):
                    version = self._replay.history.snapshot().version + 1
                    self._replay = Replay(connection, self._folder, version)
                snapshot = self._replay.history.snapshot()
            callbacks: list[Callable[[], None]] = []
            if snapshot.ended:
                callbacks, self._callbacks = self._callbacks, callbacks
        for callback in callbacks:
            callback()
        return snapshot

    def load_at(self, step: int) -> np.ndarray:
        """Loads [L, E] of a recorded step, int64.

        Raises:
            ValueError: no load of that step is on the disk; the line names the steps that are.
        """
        with naming_damage(self._folder), closing(connect(self._folder, "ro")) as connection:
            found = read_step(connection, self._folder, step)
            if found is not None:
                meta = read_meta(connection)
                return found[0].astype(np.int64).reshape(len(meta.layer_names), meta.num_experts)
            line = _unreadable_line(connection, self._folder, step)
        raise ValueError(line)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` from the first `snapshot` that shows the run ended; at once when this one does.

        Nobody watches the folder in between: a view of another process' run that no front end pulls, since it is out of
        sight, stays as it is until it is looked at.
        """
        with self._lock:
            self._callbacks.append(callback)
        self.snapshot()


def _unreadable_line(connection: sqlite3.Connection, folder: Path, step: int) -> str:
    segments = list_segments(connection)
    if not segments:
        return f"no load of step {step} can be read: {folder} holds no loads yet"
    line = f"no load of step {step} can be read; the newest readable step is {segments[-1].last}"
    if step < segments[0].first:
        line += f", the oldest {segments[0].first}"
    elif step > segments[-1].last and effective_state(connection) in LIVE_STATES:
        line += " (the running process writes newer ones soon)"
    return line


def open_source(run_or_path: Source | str | Path) -> Source:
    """A source as it is; a path as the `Tail` of that run folder.

    Raises:
        ValueError: the path is no run folder.
    """
    if isinstance(run_or_path, str | Path):
        return Tail(run_or_path)
    if isinstance(run_or_path, Source):
        return run_or_path
    raise ValueError(f"{type(run_or_path).__name__} is neither a run nor the path of a run folder")
