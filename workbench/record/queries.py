"""Loads over many steps, and questions in SQL, answered by DuckDB in memory: nothing is stored in its format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from workbench.record.arrays import FOLDER_NAME, Rows, Segment, list_segments, lost_line, read_rows
from workbench.record.database import connect, read_meta


@dataclass(frozen=True, eq=False)
class Loads:
    """Loads (int64) and biases (float32), [W, L, E], of the recorded steps [W]."""

    steps: np.ndarray
    load_WLE: np.ndarray
    bias_WLE: np.ndarray


def loads_between(folder: str | Path, first: int = 0, last: int | None = None, every: int = 1) -> Loads:
    """Loads and biases of the recorded steps in first..last (both included) that `every` divides.

    Raises:
        ValueError: not a run folder, `every` is below 1, or a segment is lost.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    folder = Path(folder)
    within = (first, 2**62 if last is None else last)
    with closing(connect(folder, "ro")) as connection:
        meta = read_meta(connection)
    width = len(meta.layer_names) * meta.num_experts
    parts = [Rows(np.empty(0, np.int64), np.empty((0, width), np.int32), np.empty((0, width), np.float32))]
    parts += [_chosen(rows, *within, every) for rows in _read_segments(folder, within)]
    steps = np.concatenate([part.steps for part in parts])
    shape = (len(steps), len(meta.layer_names), meta.num_experts)
    load_WLE = np.concatenate([part.load for part in parts], dtype=np.int64).reshape(shape)
    bias_WLE = np.concatenate([part.bias for part in parts]).reshape(shape)
    return Loads(steps, load_WLE, bias_WLE)


def _read_segments(folder: Path, within: tuple[int, int]) -> list[Rows]:
    while True:
        segments = _listed(folder)
        wanted = [segment for segment in segments if segment.first <= within[1] and segment.last >= within[0]]
        try:
            return [read_rows(folder, segment, within) for segment in wanted]
        except FileNotFoundError as error:
            # A partial segment has just been replaced by a longer one, or a file is really gone.
            if _listed(folder) == segments:
                raise ValueError(_lost(folder, segments)) from error


def _chosen(rows: Rows, first: int, last: int, every: int) -> Rows:
    return rows.where((rows.steps >= first) & (rows.steps <= last) & (rows.steps % every == 0))


def query(folder: str | Path, sql: str, parameters: Sequence[Any] = ()) -> pa.Table:
    """The answer to one SELECT over `arrays(step, load, bias)`, the flattened [L*E] lists of every recorded step.

    List entries count from 1: expert `e` of layer `l` is `load[l * num_experts + e + 1]`.

    Raises:
        ValueError: not a run folder, a segment is lost, or the query is wrong.
    """
    folder = Path(folder)
    while True:
        segments = _listed(folder)
        try:
            return _answer([folder / FOLDER_NAME / segment.file for segment in segments], sql, parameters)
        except duckdb.IOException as error:
            if _listed(folder) == segments:
                line = _lost(folder, segments) or f"the loads of {folder} cannot be read: {_first_line(error)}"
                raise ValueError(line) from error
        except duckdb.Error as error:
            raise ValueError(f"the query cannot be answered: {_first_line(error)}") from error


def _listed(folder: Path) -> list[Segment]:
    with closing(connect(folder, "ro")) as connection:
        return list_segments(connection)


def _lost(folder: Path, segments: Sequence[Segment]) -> str:
    """A line about the first segment whose file is gone; empty when there is none."""
    lost = [segment for segment in segments if not (folder / FOLDER_NAME / segment.file).is_file()]
    return lost_line(folder, lost[0]) if lost else ""


def _answer(files: Sequence[Path], sql: str, parameters: Sequence[Any]) -> pa.Table:
    with duckdb.connect() as engine:
        engine.execute("SET autoinstall_known_extensions = false")
        engine.execute("SET autoload_known_extensions = false")
        if files:
            engine.read_parquet([str(file) for file in files]).create_view("arrays")
        else:
            engine.execute("CREATE TABLE arrays (step BIGINT, load INTEGER[], bias FLOAT[])")
        return engine.sql(sql, params=list(parameters)).to_arrow_table()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
