"""One writer per run folder."""

from __future__ import annotations

import sqlite3
import uuid
import weakref
from pathlib import Path

from workbench.record.database import read_status, transaction
from workbench.record.process import Process, this_process
from workbench.record.snapshot import LIVE_STATES, ORPHANED


class Claim:
    """The right to write a run folder, held until `release` or the end of the process.

    It is a row in the run's database, taken in one transaction. The row of a dead process, or of this process when its
    `Claim` is gone, is stale and taken over. A process of another machine cannot be asked and counts as living, unless
    `take_over` says that it surely is not.

    Raises:
        ValueError: another living writer holds the folder.
    """

    def __init__(self, connection: sqlite3.Connection, folder: Path, *, take_over: bool = False) -> None:
        self.token = uuid.uuid4().hex
        me = this_process()
        with transaction(connection, "IMMEDIATE"):
            if not take_over:
                _refuse_living_writer(connection, folder, me)
            connection.execute(
                "INSERT OR REPLACE INTO writer VALUES (1, ?, ?, ?, ?)", (me.host, me.pid, me.started, self.token)
            )
        _held[self.token] = self

    def require(self, connection: sqlite3.Connection, folder: Path) -> None:
        """Make sure, inside a transaction, that nobody has taken the folder over.

        Raises:
            RuntimeError: somebody has.
        """
        if _read_token(connection) != self.token:
            raise RuntimeError(f"{folder} has been taken over by another writer; this one must stop")

    def release(self, connection: sqlite3.Connection) -> None:
        """Let the folder go."""
        connection.execute("DELETE FROM writer WHERE token = ?", (self.token,))
        _held.pop(self.token, None)


# Tokens of the claims that live in this process: a claim whose holder was dropped without release must not lock the
# folder until the process ends.
_held: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()


def effective_state(connection: sqlite3.Connection) -> str:
    """The recorded state, or `ORPHANED` when a live run has no living writer."""
    state = read_status(connection).state
    if state not in LIVE_STATES:
        return state
    writer = _read_writer(connection)
    return state if writer is not None and writer.is_alive() else ORPHANED


def _refuse_living_writer(connection: sqlite3.Connection, folder: Path, me: Process) -> None:
    writer = _read_writer(connection)
    if writer is None:
        return
    if writer == me:
        if _read_token(connection) in _held:
            raise ValueError(
                f"{folder} is already being written by this process (id {me.pid}); close that writer first"
            )
    elif not writer.is_here():
        raise ValueError(
            f"{folder} is written by process {writer.pid} of {writer.host!r}, which cannot be asked from here; "
            "once it has surely ended, reopen the run with take_over=True"
        )
    elif writer.is_alive():
        raise ValueError(f"{folder} is being written by process {writer.pid}; stop that run first")


def _read_writer(connection: sqlite3.Connection) -> Process | None:
    row = connection.execute("SELECT host, pid, started FROM writer").fetchone()
    return None if row is None else Process(*row)


def _read_token(connection: sqlite3.Connection) -> str | None:
    row = connection.execute("SELECT token FROM writer").fetchone()
    return None if row is None else row[0]
