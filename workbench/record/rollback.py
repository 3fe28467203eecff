"""Bringing a run folder back to what it was at an earlier step."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.record import checkpoint_folders
from workbench.record.arrays import Segment, delete_unlisted, list_segments, read_rows, write_segment
from workbench.record.database import read_meta, read_status, transaction
from workbench.record.ownership import Claim
from workbench.record.session import Session


def drop_after(
    connection: sqlite3.Connection,
    folder: Path,
    at_step: int,
    claim: Claim,
    *,
    total_steps: int | None,
    hardware: Mapping[str, Any],
) -> None:
    """Drop everything recorded after `at_step` and begin a new session.

    What was set before step `at_step + 1` stays: it was given to the very state that the run goes on from.
    Killed in between, the folder is either as before or dropped; files that are no longer listed are deleted last.

    Raises:
        ValueError: `at_step` is not in 0..newest recorded step.
    """
    status, meta = read_status(connection), read_meta(connection)
    if not 0 <= at_step <= status.step:
        raise ValueError(f"at_step={at_step} must lie in 0..{status.step}, the newest recorded step of {folder}")
    connection.execute("PRAGMA journal_mode = WAL")
    session = Session.begin(seed=meta.seed, text_fingerprint=meta.text_fingerprint, hardware=hardware)
    kept = _segments_until(connection, folder, at_step)
    with transaction(connection, "IMMEDIATE"):
        claim.require(connection, folder)
        for table in ("scalars", "evaluations", "samples", "spikes"):
            connection.execute(f"DELETE FROM {table} WHERE step > ?", (at_step,))
        connection.execute("DELETE FROM changes WHERE step > ?", (at_step + 1,))
        connection.execute(
            "DELETE FROM controls WHERE applied_step IS NULL OR applied_step > ? + (kind = 'set')", (at_step,)
        )
        connection.execute("DELETE FROM segments")
        rows = [(segment.first, segment.last, segment.file) for segment in kept]
        connection.executemany("INSERT INTO segments VALUES (?, ?, ?)", rows)
        connection.execute(
            "UPDATE status SET state = 'starting', message = '', step = ?, total_steps = ?, session = ?, "
            "commits = commits + 1",
            (at_step, status.total_steps if total_steps is None else total_steps, claim.token),
        )
        session.insert(connection, at_step)
    delete_unlisted(folder, kept)
    checkpoint_folders.delete_after(folder, at_step)


def _segments_until(connection: sqlite3.Connection, folder: Path, at_step: int) -> list[Segment]:
    """The segments of steps up to `at_step`; one that spans it is written anew, shorter."""
    kept = [segment for segment in list_segments(connection) if segment.first <= at_step]
    if kept and kept[-1].last > at_step:
        spanning = kept.pop()
        try:
            rows = read_rows(folder, spanning)
            kept.append(write_segment(folder, rows.where(rows.steps <= at_step)))
        except (FileNotFoundError, ValueError):
            # Lost or damaged: it stays listed under its kept steps, so that reading them says so.
            kept.append(Segment(spanning.first, at_step, spanning.file))
    return kept
