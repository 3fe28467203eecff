"""The controls that wait for a run, looked up before every step."""

from __future__ import annotations

from pathlib import Path

from workbench.record import Control, Controls
from workbench.record.database import connect


class Mailbox:
    """`Controls.pending` behind SQLite's own change counter: while nothing is written, a look costs microseconds."""

    def __init__(self, folder: Path) -> None:
        self._controls = Controls(folder)
        self._connection = connect(folder, "ro")
        self._seen_version: int | None = None

    def pending(self) -> tuple[Control, ...]:
        """What has been sent and not yet applied, oldest first; the caller applies all of it before it looks again."""
        # The version is read first: what arrives in between has a newer one and is found by the next look.
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version == self._seen_version:
            return ()
        self._seen_version = version
        return self._controls.pending()

    def close(self) -> None:
        """Let go of the database."""
        self._connection.close()
