"""The one writer of a run folder."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from workbench.record import arrays
from workbench.record.arrays import Rows, Segment
from workbench.record.controls import Controls
from workbench.record.database import connect, read_meta, read_status, transaction
from workbench.record.evaluations import evaluation_to_json
from workbench.record.history import History
from workbench.record.new_run import make_run_folder
from workbench.record.ownership import Claim
from workbench.record.replay import Replay
from workbench.record.rollback import drop_after
from workbench.record.scalars import scalars_of
from workbench.record.snapshot import ENDED_STATES, LIVE_STATES
from workbench.train.events import Checkpoint, Evaluation, Event, Spike, Step

FLUSH_STEPS = 50
FLUSH_SECONDS = 2.0


class RunWriter:
    """Writes a run folder; made by `create` or `reopen`, ended by `close`.

    Events are committed together every `FLUSH_STEPS` steps, when `FLUSH_SECONDS` have passed at a write, with every
    evaluation, control and status, and before every checkpoint, so that no checkpoint is ahead of the record. What was
    not committed when the process is killed is gone, as if it had never happened.

    `history` holds everything written, at once and in memory, for the views of this process. All methods may be called
    from any thread.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection, claim: Claim) -> None:
        """Only for `create` and `reopen`, which hold the claim."""
        self.folder = folder
        self._connection = connection
        self._claim = claim
        self._lock = threading.RLock()
        self._closed = False
        meta = read_meta(connection)
        self._layer_names = meta.layer_names
        self._shape = (len(meta.layer_names), meta.num_experts)
        replay = Replay(connection, folder)
        replay.update(connection)
        self.history: History = replay.history
        snapshot = self.history.snapshot()
        status = read_status(connection)
        self._state = (status.state, status.message)
        self._step = status.step
        self._evaluation_step = max((event.step for event in snapshot.evaluations), default=-1)
        self._spike_step = max((event.step for event in snapshot.spikes), default=-1)
        self._pending = _Pending()
        # A segment that is not yet full is rewritten, longer, by the next flush.
        self._open_segment, self._open_rows = self._continued_segment()
        self._flushed_at = monotonic()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        recipe_json: str,
        seed: int,
        total_steps: int,
        text_fingerprint: str,
        layer_names: Sequence[str],
        num_experts: int,
        hardware: Mapping[str, Any],
    ) -> RunWriter:
        """Make a new run folder, which appears whole or not at all.

        Raises:
            ValueError: the folder exists or its name is not allowed; the recipe is not JSON; a count is negative.
        """
        folder = Path(folder).absolute()
        claim = make_run_folder(
            folder,
            recipe_json=recipe_json,
            seed=seed,
            total_steps=total_steps,
            text_fingerprint=text_fingerprint,
            layer_names=tuple(layer_names),
            num_experts=num_experts,
            hardware=hardware,
        )
        return cls(folder, connect(folder, "rw"), claim)

    @classmethod
    def reopen(
        cls,
        folder: str | Path,
        at_step: int,
        *,
        total_steps: int | None = None,
        hardware: Mapping[str, Any] | None = None,
        take_over: bool = False,
    ) -> RunWriter:
        """Continue a run after `at_step`, the step of a checkpoint. Everything recorded later is dropped.

        Dropped are scalars, loads, evaluations, samples, spikes, changes and checkpoints of later steps, and controls
        that were applied later or not at all: a Stop that a killed run never saw must not stop its successor. What was
        set between `at_step` and the next step stays, for the trainer to apply again. What the run continues in
        (`hardware`, versions, source) is kept in the table `sessions`.

        Raises:
            ValueError: not a run folder; another living writer holds it; `at_step` is not in 0..newest recorded step.
        """
        folder = Path(folder).absolute()
        connection = connect(folder, "rw")
        try:
            claim = Claim(connection, folder, take_over=take_over)
            try:
                drop_after(connection, folder, at_step, claim, total_steps=total_steps, hardware=hardware or {})
                return cls(folder, connection, claim)
            except BaseException:
                claim.release(connection)
                raise
        except BaseException:
            connection.close()
            raise

    def write(self, event: Event) -> None:
        """Record an event. A `Checkpoint` holds nothing to record and commits what came before it.

        Raises:
            ValueError: the step does not follow the last one of its kind, the arrays or layer names are not those of
                this run, or the writer is closed.
            OSError: the disk is full; what was committed before stays readable.
        """
        with self._lock:
            self._require_open()
            if isinstance(event, Step):
                self._write_step(event)
            elif isinstance(event, Evaluation):
                _require_later("Evaluation", event.step, self._evaluation_step)
                # A text that UTF-8 cannot hold is refused now, not when it is committed with much else.
                event.sample.encode()
                value = evaluation_to_json(event, self._shape)
                self._pending.evaluations.append((int(event.step), value, event.sample))
                self._evaluation_step = event.step
                self.history.add(event)
            elif isinstance(event, Spike):
                _require_later("Spike", event.step, self._spike_step)
                self._pending.spikes.append((int(event.step), float(event.loss_nats), float(event.threshold_nats)))
                self._spike_step = event.step
                self.history.add(event)
            full = len(self._open_rows) + len(self._pending.rows) >= FLUSH_STEPS
            late = monotonic() - self._flushed_at >= FLUSH_SECONDS
            if full or late or isinstance(event, Evaluation | Checkpoint):
                self._flush()

    def applied(self, control_id: int, step: int) -> None:
        """Confirm a control with the first step that it acts on, commit, and show it in the history."""
        with self._lock:
            self._require_open()
            self._flush()
            for change in Controls(self.folder).applied(control_id, step):
                self.history.add_change(*change)

    def load_at(self, step: int) -> np.ndarray:
        """Loads [L, E] of any step written, committed or not, int64; also after `close`.

        Raises:
            ValueError: that step has not been written, or its file is lost.
        """
        with self._lock:
            for row_step, load, _ in (*self._pending.rows, *self._open_rows):
                if row_step == step:
                    return load.astype(np.int64).reshape(self._shape)
        with closing(connect(self.folder, "ro")) as connection:
            found = arrays.read_step(connection, self.folder, step)
        if found is None:
            raise ValueError(f"no load of step {step} is recorded; the newest step is {self._step}")
        return found[0].astype(np.int64).reshape(self._shape)

    def status(self, state: str, message: str = "") -> None:
        """Record the state of the run and commit.

        Raises:
            ValueError: `state` is none that a writer may set.
        """
        allowed = (*LIVE_STATES, *ENDED_STATES)
        if state not in allowed:
            raise ValueError(f"state {state!r} must be one of {', '.join(allowed)}")
        with self._lock:
            self._require_open()
            self._commit_state(state, message)

    def flush(self) -> None:
        """Commit everything written so far."""
        with self._lock:
            self._require_open()
            self._flush()

    def close(self) -> None:
        """Commit, merge the segments into few files and let the folder go. A run still live is recorded as stopped.

        Afterwards the folder needs no WAL file beside its database. Closing again does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._state[0] in LIVE_STATES:
                    self._commit_state("stopped", self._state[1])
                self._flush()
                self._compact()
            finally:
                try:
                    self._claim.release(self._connection)
                    _leave_wal_mode(self._connection)
                finally:
                    self._connection.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_step(self, event: Step) -> None:
        _require_later("Step", event.step, self._step)
        if tuple(event.layer_names) != self._layer_names:
            raise ValueError(f"layer_names {event.layer_names} are not those of this run: {self._layer_names}")
        numbers = scalars_of(event)
        load = arrays.checked_load(event.load_LE, self._shape)
        bias = arrays.checked_bias(event.bias_LE, self._shape)
        step = int(event.step)
        self._pending.scalars.extend((step, name, value) for name, value in numbers.items())
        self._pending.rows.append((step, load, bias))
        self._step = step
        self.history.add(event)

    def _commit_state(self, state: str, message: str) -> None:
        """Commit first: who sees "paused" in memory finds every step before it on the disk."""
        self._pending.status = self._pending.status or self._state != (state, message)
        self._state = (state, message)
        self._flush()
        self.history.set_status(state, message)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"the writer of {self.folder} is closed")

    def _flush(self) -> None:
        self._flushed_at = monotonic()
        if self._pending.is_empty():
            return
        try:
            self._commit()
        except (OSError, sqlite3.OperationalError) as error:
            committed = read_status(self._connection).step
            raise OSError(
                f"steps {committed + 1}..{self._step} could not be recorded in {self.folder} ({error}); "
                f"everything up to step {committed} is kept"
            ) from error

    def _commit(self) -> None:
        """The rule of `database`: new array files first, then the commit, then the deletion of replaced files."""
        pending, rows, segment = self._pending, self._open_rows + self._pending.rows, None
        replaced = self._open_segment
        if pending.rows:
            segment = arrays.write_segment(self.folder, _stacked(rows))
        with transaction(self._connection, "IMMEDIATE"):
            self._claim.require(self._connection, self.folder)
            pending.insert(self._connection)
            if segment is not None:
                _replace_segments(self._connection, [] if replaced is None else [replaced], segment)
            self._connection.execute(
                "UPDATE status SET state = ?, message = ?, step = ?, commits = commits + 1", (*self._state, self._step)
            )
        self._pending = _Pending()
        if segment is not None:
            if replaced is not None:
                _delete_segment_file(self.folder, replaced)
            is_full = len(rows) >= FLUSH_STEPS
            self._open_segment, self._open_rows = (None, []) if is_full else (segment, rows)

    def _compact(self) -> None:
        """Merge neighbouring segments. A group with a damaged file stays as it is; reading it says what is wrong."""
        row_values = self._shape[0] * self._shape[1]
        for group in arrays.plan_compaction(self.folder, arrays.list_segments(self._connection), row_values):
            try:
                merged = arrays.merge_segments(self.folder, group, row_values)
            except ValueError:
                continue
            with transaction(self._connection, "IMMEDIATE"):
                self._claim.require(self._connection, self.folder)
                _replace_segments(self._connection, group, merged)
            for segment in group:
                _delete_segment_file(self.folder, segment)

    def _continued_segment(self) -> tuple[Segment | None, list[_Row]]:
        """The last segment and its rows when it is not yet full."""
        segments = arrays.list_segments(self._connection)
        if not segments or segments[-1].last - segments[-1].first + 1 >= FLUSH_STEPS:
            return None, []
        try:
            rows = arrays.read_rows(self.folder, segments[-1])
        except (FileNotFoundError, ValueError):
            # Lost or damaged: it stays listed, so that reading it says so, and the next step begins a new segment.
            return None, []
        return segments[-1], list(zip(rows.steps.tolist(), rows.load, rows.bias, strict=True))


_Row = tuple[int, np.ndarray, np.ndarray]


class _Pending:
    """What has been written and is not yet committed."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, str, float]] = []
        self.rows: list[_Row] = []
        self.evaluations: list[tuple[int, str, str]] = []
        self.spikes: list[tuple[int, float, float]] = []
        self.status = False

    def is_empty(self) -> bool:
        return not (self.scalars or self.evaluations or self.spikes or self.status)

    def insert(self, connection: sqlite3.Connection) -> None:
        """NaN becomes NULL."""
        evaluations = [(step, value) for step, value, _ in self.evaluations]
        samples = [(step, sample) for step, _, sample in self.evaluations]
        connection.executemany("INSERT INTO scalars VALUES (?, ?, ?)", self.scalars)
        connection.executemany("INSERT INTO evaluations VALUES (?, ?)", evaluations)
        connection.executemany("INSERT INTO samples VALUES (?, ?)", samples)
        connection.executemany("INSERT INTO spikes VALUES (?, ?, ?)", self.spikes)


def _stacked(rows: Sequence[_Row]) -> Rows:
    steps, loads, biases = zip(*rows, strict=True)
    return Rows(np.array(steps, np.int64), np.stack(loads), np.stack(biases))


def _require_later(kind: str, step: int, last: int) -> None:
    if step <= last:
        raise ValueError(f"{kind} of step {step} cannot follow that of step {last}; steps must grow")


def _replace_segments(connection: sqlite3.Connection, old: Iterable[Segment], new: Segment) -> None:
    connection.executemany("DELETE FROM segments WHERE first = ?", [(segment.first,) for segment in old])
    connection.execute("INSERT INTO segments VALUES (?, ?, ?)", (new.first, new.last, new.file))


def _delete_segment_file(folder: Path, segment: Segment) -> None:
    # Windows refuses while a reader has it open; the next `reopen` deletes what is not listed.
    with suppress(PermissionError):
        (folder / arrays.FOLDER_NAME / segment.file).unlink(missing_ok=True)


def _leave_wal_mode(connection: sqlite3.Connection) -> None:
    """Make the database one plain file; while somebody reads it, it stays as valid with its WAL file."""
    connection.execute("PRAGMA busy_timeout = 0")
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = DELETE")
