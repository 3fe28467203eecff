"""Questions to the record, answered by DuckDB in memory: nothing is ever stored in its format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from workbench.record.arrays import FOLDER_NAME, Segment, list_segments, lost_line
from workbench.record.database import connect, read_meta


@dataclass(frozen=True, eq=False)
class Loads:
    """Loads (int64) and biases (float32), [S, L, E], of the recorded steps [S]."""

    steps: np.ndarray
    load_SLE: np.ndarray
    bias_SLE: np.ndarray


def loads_between(folder: str | Path, first: int = 0, last: int | None = None, every: int = 1) -> Loads:
    """Loads and biases of the recorded steps in first..last (both included) that `every` divides.

    Raises:
        ValueError: not a run folder, `every` is below 1, or a segment is lost.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    sql = "SELECT step, load, bias FROM arrays WHERE step BETWEEN $1 AND $2 AND step % $3 = 0 ORDER BY step"
    table = query(folder, sql, [first, 2**62 if last is None else last, every])
    with closing(connect(Path(folder), "ro")) as connection:
        meta = read_meta(connection)
    shape = (len(table), len(meta.layer_names), meta.num_experts)
    load = table["load"].combine_chunks().flatten().to_numpy()
    bias = table["bias"].combine_chunks().flatten().to_numpy()
    return Loads(table["step"].to_numpy(), load.astype(np.int64).reshape(shape), bias.reshape(shape))


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
            if _listed(folder) != segments:
                # A partial segment has just been replaced by a longer one: ask anew.
                continue
            lost = [segment for segment in segments if not (folder / FOLDER_NAME / segment.file).is_file()]
            line = lost_line(folder, lost[0]) if lost else f"the loads of {folder} cannot be read: {_first_line(error)}"
            raise ValueError(line) from error
        except duckdb.Error as error:
            raise ValueError(f"the query cannot be answered: {_first_line(error)}") from error


def _listed(folder: Path) -> list[Segment]:
    with closing(connect(folder, "ro")) as connection:
        return list_segments(connection)


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
