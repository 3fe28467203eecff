"""In what a run started or was continued: one session for each."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.record.environment import environment
from workbench.record.git import git_state
from workbench.record.plain_json import dumps


@dataclass(frozen=True)
class Session:
    """Environment and uncommitted source changes of the process that writes."""

    environment: dict[str, Any]
    git_diff: bytes

    @classmethod
    def begin(cls, *, seed: int, text_fingerprint: str, hardware: Mapping[str, Any]) -> Session:
        """That of this process; the source is the one of the workbench itself.

        Raises:
            ValueError: `hardware` holds something that JSON cannot give back.
        """
        git = git_state(Path(__file__))
        account = environment(seed=seed, text_fingerprint=text_fingerprint, hardware=hardware, git=git)
        dumps(account)
        return cls(account, git.diff)

    def insert(self, connection: sqlite3.Connection, at_step: int) -> None:
        """Record the session as the newest one, which began after `at_step`."""
        now = datetime.now(UTC).isoformat()
        connection.execute(
            "INSERT INTO sessions (at_step, started, environment, git_diff) VALUES (?, ?, ?, ?)",
            (at_step, now, dumps(self.environment), self.git_diff),
        )
