"""From the database of a run back to a `History`."""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

from workbench.record.arrays import Segment, list_segments, read_step
from workbench.record.database import read_meta, read_status, transaction
from workbench.record.evaluations import evaluation_from_json
from workbench.record.history import History
from workbench.record.ownership import effective_state
from workbench.train.events import Spike


class Replay:
    """A history that is brought up to what a run's database holds, reading only what is new.

    It serves one session of a run: when the run was resumed, steps may be gone, and a new replay must begin.
    """

    def __init__(self, connection: sqlite3.Connection, folder: Path, version: int = 1) -> None:
        meta = read_meta(connection)
        status = read_status(connection)
        self.session = status.session
        self.history = History(
            folder,
            total_steps=status.total_steps,
            layer_names=meta.layer_names,
            num_experts=meta.num_experts,
            version=version,
        )
        self._folder = folder
        self._shape = (len(meta.layer_names), meta.num_experts)
        self._commits = -1
        self._scalar_step = self._evaluation_step = self._spike_step = -1
        self._change_id = 0
        self._load_step = 0

    def update(self, connection: sqlite3.Connection) -> bool:
        """Read what has been committed since the last call; False when the run was resumed meanwhile."""
        with transaction(connection, "DEFERRED"):
            status = read_status(connection)
            if status.session != self.session:
                return False
            state = effective_state(connection)
            if status.commits != self._commits:
                self._read_scalars(connection)
                self._read_evaluations(connection)
                self._read_spikes(connection)
                self._read_changes(connection)
                segments = list_segments(connection)
            else:
                segments = []
        self._commits = status.commits
        self.history.set_status(state, status.message)
        # Outside the transaction, so that a file that the writer has just replaced is looked up anew.
        self._read_newest_load(connection, segments)
        return True

    def _read_scalars(self, connection: sqlite3.Connection) -> None:
        query = "SELECT step, name, value FROM scalars WHERE step > ? ORDER BY step, name"
        series: defaultdict[str, tuple[list[int], list[Any]]] = defaultdict(lambda: ([], []))
        for step, name, value in connection.execute(query, (self._scalar_step,)):
            steps, values = series[name]
            steps.append(step)
            values.append(value)
            self._scalar_step = step
        if series:
            # None, which is SQLite's NaN, becomes NaN in an array of floats.
            self.history.add_series(self._scalar_step, series)

    def _read_evaluations(self, connection: sqlite3.Connection) -> None:
        query = "SELECT step, value, text FROM evaluations JOIN samples USING (step) WHERE step > ? ORDER BY step"
        rows = connection.execute(query, (self._evaluation_step,)).fetchall()
        if rows:
            self.history.add_evaluations(
                tuple(evaluation_from_json(step, value, text, self._shape) for step, value, text in rows)
            )
            self._evaluation_step = rows[-1][0]

    def _read_spikes(self, connection: sqlite3.Connection) -> None:
        query = "SELECT step, loss_nats, threshold_nats FROM spikes WHERE step > ? ORDER BY step"
        rows = connection.execute(query, (self._spike_step,)).fetchall()
        if rows:
            spikes = (Spike(step=s, loss_nats=_number(loss), threshold_nats=_number(edge)) for s, loss, edge in rows)
            self.history.add_spikes(tuple(spikes))
            self._spike_step = rows[-1][0]

    def _read_changes(self, connection: sqlite3.Connection) -> None:
        query = "SELECT id, step, name, value FROM changes WHERE id > ? ORDER BY id"
        for change_id, step, name, value in connection.execute(query, (self._change_id,)):
            self.history.add_change(step, name, value)
            self._change_id = change_id

    def _read_newest_load(self, connection: sqlite3.Connection, segments: list[Segment]) -> None:
        """Take the newest load that can be read; `load_step` tells when lost files make it an older one."""
        for segment in reversed(segments):
            if segment.last <= self._load_step:
                return
            try:
                found = read_step(connection, self._folder, segment.last)
            except ValueError:
                continue
            if found is not None:
                load, bias = found
                self.history.set_load(segment.last, load.reshape(self._shape), bias.reshape(self._shape))
                self._load_step = segment.last
                return


def _number(value: float | None) -> float:
    """SQLite stores NaN as NULL."""
    return math.nan if value is None else value
