"""A new run folder."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.record import arrays, checkpoint_folders
from workbench.record.database import FILE_NAME, SCHEMA_VERSION, create_tables
from workbench.record.durable import fsync_folder, write_file
from workbench.record.names import validate_name
from workbench.record.ownership import Claim
from workbench.record.plain_json import dumps
from workbench.record.runs import sweep
from workbench.record.session import Session


def make_run_folder(
    folder: Path,
    *,
    recipe_json: str,
    seed: int,
    total_steps: int,
    text_fingerprint: str,
    layer_names: tuple[str, ...],
    num_experts: int,
    hardware: Mapping[str, Any],
) -> Claim:
    """Make the folder of a run that is about to start, which appears whole or not at all, and claim it.

    Raises:
        ValueError: the folder exists or its name is not allowed; the recipe is not JSON; a count is negative.
    """
    validate_name(folder.parent, folder.name)
    if total_steps < 0 or num_experts < 0:
        raise ValueError(f"total_steps={total_steps} and num_experts={num_experts} must not be negative")
    try:
        json.loads(recipe_json)
    except ValueError as error:
        raise ValueError(f"the recipe is not JSON: {error}") from error
    session = Session.begin(seed=seed, text_fingerprint=text_fingerprint, hardware=hardware)
    meta = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(),
        "seed": seed,
        "text_fingerprint": text_fingerprint,
        "layer_names": list(layer_names),
        "num_experts": num_experts,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    building = folder.parent / f".creating-{uuid.uuid4().hex}"
    try:
        _write_files(building, recipe_json, session)
        with closing(sqlite3.connect(building / FILE_NAME, isolation_level=None)) as connection:
            create_tables(connection)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(key, dumps(meta[key])) for key in meta])
            claim = Claim(connection, folder)
            connection.execute("INSERT INTO status VALUES (1, 'starting', '', 0, ?, ?, 0)", (total_steps, claim.token))
            session.insert(connection, at_step=0)
        _move_into_place(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    return claim


def _write_files(folder: Path, recipe_json: str, session: Session) -> None:
    folder.mkdir()
    (folder / arrays.FOLDER_NAME).mkdir()
    (folder / checkpoint_folders.FOLDER_NAME).mkdir()
    write_file(folder / "recipe.json", recipe_json.encode())
    write_file(folder / "environment.json", json.dumps(session.environment, indent=2, allow_nan=False).encode())
    if session.git_diff:
        write_file(folder / "git.diff", session.git_diff)
    fsync_folder(folder)


def _move_into_place(building: Path, folder: Path) -> None:
    try:
        os.rename(building, folder)
    except OSError as error:
        if folder.exists():
            raise ValueError(f"the run {folder.name!r} exists already in {folder.parent}") from error
        raise
