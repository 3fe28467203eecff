"""The SQLite file of a run folder: its tables, and how they are opened.

What counts as recorded is what is committed here, and nothing else: a step is recorded when its scalars are committed;
an array segment exists when `segments` lists it. The files of newly listed segments reach the disk before the commit
and those no longer listed are deleted after it, so a committed step has its arrays and a killed writer leaves at most
files that nothing lists; readers never look at them and `RunWriter.reopen` deletes them. A listed file that is gone or
damaged was harmed from outside: reading its steps says so, everything else goes on.

WAL mode: readers never block the writer. It needs a local disk; a network file system is not supported.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench.record.plain_json import loads

SCHEMA_VERSION = 1
FILE_NAME = "run.sqlite"

# scalars.value: NULL is NaN. status.session names the newest session; when it changes, steps may have been dropped and
# readers begin anew. status.commits changes with every commit that a snapshot could show.
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE status (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    state TEXT NOT NULL, message TEXT NOT NULL, step INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    session TEXT NOT NULL, commits INTEGER NOT NULL
);
CREATE TABLE writer (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL, token TEXT NOT NULL
);
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, at_step INTEGER NOT NULL, started TEXT NOT NULL,
    environment TEXT NOT NULL, git_diff BLOB NOT NULL
);
CREATE TABLE scalars (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name)) WITHOUT ROWID;
CREATE TABLE segments (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, file TEXT NOT NULL);
CREATE TABLE evaluations (step INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE samples (step INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE spikes (step INTEGER PRIMARY KEY, loss_nats REAL, threshold_nats REAL);
CREATE TABLE changes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL
);
CREATE TABLE controls (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, value TEXT NOT NULL, applied_step INTEGER
);
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Turn a new database into an empty run database."""
    connection.execute("PRAGMA journal_mode = WAL")
    # The folder is not yet in place: the disk is waited for once, when the connection is closed.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(_SCHEMA)


def connect(folder: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Open the database of a run folder for reading or writing.

    Raises:
        ValueError: it is not a run folder, the database is damaged, or its schema is of another version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {FILE_NAME}")
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path} cannot be read as a run database: {error}") from error
    if row is None or loads(row[0]) != SCHEMA_VERSION:
        connection.close()
        found = "none" if row is None else row[0]
        raise ValueError(f"{path} has schema_version {found}; this version of the workbench reads {SCHEMA_VERSION}")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[None]:
    """All statements inside count together or not at all. IMMEDIATE writes; DEFERRED reads one consistent state."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk makes SQLite roll back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@dataclass(frozen=True)
class Meta:
    """What never changes in the life of a run."""

    created: str
    seed: int
    text_fingerprint: str
    layer_names: tuple[str, ...]
    num_experts: int


def read_meta(connection: sqlite3.Connection) -> Meta:
    """The fixed facts of a run."""
    values = {key: loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    return Meta(
        created=values["created"],
        seed=values["seed"],
        text_fingerprint=values["text_fingerprint"],
        layer_names=tuple(values["layer_names"]),
        num_experts=values["num_experts"],
    )


@dataclass(frozen=True)
class Status:
    """The status row."""

    state: str
    message: str
    step: int
    total_steps: int
    session: str
    commits: int


def read_status(connection: sqlite3.Connection) -> Status:
    """The status row as recorded; whether the writer still lives is `ownership.effective_state`'s to say."""
    columns = "state, message, step, total_steps, session, commits"
    return Status(*connection.execute(f"SELECT {columns} FROM status").fetchone())
