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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

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


class _RunConnection(sqlite3.Connection):
    """A connection all of whose statements and rows say in one line which run is damaged.

    What a writer meets beside damage (a full disk, a lock) stays a `sqlite3.OperationalError`, for the writer to
    handle; a reader can do no more about it than about damage.
    """

    path: Path
    reads_only: bool

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return _RunCursor(self).execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return _RunCursor(self).executemany(*arguments)

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # Damage has no class of its own: it is what remains when none of the others fits.
            if type(error) is sqlite3.DatabaseError or (self.reads_only and type(error) is sqlite3.OperationalError):
                raise ValueError(f"{self.path} cannot be read as a run database: {error}") from error
            raise


class _RunCursor(sqlite3.Cursor):
    connection: _RunConnection

    def execute(self, *arguments: Any) -> Any:
        with self.connection.named():
            return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        with self.connection.named():
            return super().executemany(*arguments)

    def fetchone(self) -> Any:
        with self.connection.named():
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with self.connection.named():
            return super().fetchall()

    def __next__(self) -> Any:
        with self.connection.named():
            return super().__next__()


def connect(folder: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Open the database of a run folder for reading or writing.

    Whatever is read later from a damaged part raises the same.

    Raises:
        ValueError: it is not a run folder, the database is damaged, or its schema is of another version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {FILE_NAME}")
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False, factory=_RunConnection
    )
    try:
        connection.path, connection.reads_only = path, True
        row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        connection.execute("PRAGMA synchronous = FULL")
        connection.reads_only = mode == "ro"
        if row is None or loads(row[0]) != SCHEMA_VERSION:
            found = "none" if row is None else row[0]
            raise ValueError(f"{path} has schema_version {found}; this version of the workbench reads {SCHEMA_VERSION}")
    except BaseException:
        connection.close()
        raise
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


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turn what a cell of a wrong kind does to the code that reads it into one line that names the database.

    A whole database of this version holds no such cell: that these errors mean damage is known here and nowhere else.
    """
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError) as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder / FILE_NAME} cannot be read as a run database: {words}") from error
    except ValueError as error:
        if FILE_NAME in str(error) or str(folder) in str(error):
            raise
        words = str(error).splitlines()[0]
        raise ValueError(f"{folder / FILE_NAME} cannot be read as a run database: {words}") from error


@dataclass(frozen=True)
class Meta:
    """What never changes in the life of a run."""

    created: str
    seed: int
    text_fingerprint: str
    layer_names: tuple[str, ...]
    num_experts: int


def read_meta(connection: sqlite3.Connection) -> Meta:
    """The fixed facts of a run.

    Raises:
        ValueError: some are missing, as after damage.
    """
    values = {key: loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    missing = {field.name for field in fields(Meta)} - set(values)
    if missing:
        raise ValueError(f"{_place(connection)} has lost {', '.join(sorted(missing))}")
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
    """The status row as recorded; whether the writer still lives is `ownership.effective_state`'s to say.

    Raises:
        ValueError: there is none, as after damage.
    """
    columns = "state, message, step, total_steps, session, commits"
    row = connection.execute(f"SELECT {columns} FROM status").fetchone()
    if row is None:
        raise ValueError(f"{_place(connection)} has lost its status")
    return Status(*row)


def _place(connection: sqlite3.Connection) -> str:
    return str(connection.path) if isinstance(connection, _RunConnection) else "the run database"
