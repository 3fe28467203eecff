"""Loads and biases of every step in Parquet segments.

A segment is a file `steps-FIRST-LAST.parquet` with the columns `step` (int64), `load` (list of int32) and `bias` (list
of float32), the [L, E] arrays flattened row by row. The database table `segments` says which segments there are.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.record.durable import fsync_file, fsync_folder

FOLDER_NAME = "arrays"
_TEMPORARY = ".tmp-"
# One row group is read to show one step; a compacted file is what one query has to hold open.
_ROW_GROUP_BYTES = 2**20
_COMPACTED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rows:
    """Consecutive recorded steps [W] with loads [W, L*E] int32 and biases [W, L*E] float32."""

    steps: np.ndarray
    load: np.ndarray
    bias: np.ndarray

    def where(self, kept: np.ndarray) -> Rows:
        """Those that a mask [S] keeps."""
        return Rows(self.steps[kept], self.load[kept], self.bias[kept])


@dataclass(frozen=True)
class Segment:
    """A listed file and the steps that it holds."""

    first: int
    last: int
    file: str


def checked_load(load_LE: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The load as a flat int32 array.

    Raises:
        ValueError: the array has another shape than [L, E], is not of integers or does not fit.
    """
    if load_LE.shape != shape or load_LE.dtype.kind not in "iu":
        raise ValueError(f"load is {load_LE.dtype} of shape {load_LE.shape}; integers of shape {shape} are recorded")
    if load_LE.size and not 0 <= int(load_LE.min()) <= int(load_LE.max()) < 2**31:
        raise ValueError(f"load lies in {load_LE.min()}..{load_LE.max()}; it must lie in 0..{2**31 - 1}")
    return load_LE.astype(np.int32).ravel()


def checked_bias(bias_LE: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The bias as a flat float32 array.

    Raises:
        ValueError: the array has another shape than [L, E].
    """
    if bias_LE.shape != shape:
        raise ValueError(f"bias has shape {bias_LE.shape}; this run records {shape}")
    return bias_LE.astype(np.float32).ravel()


def write_segment(folder: Path, rows: Rows) -> Segment:
    """Write rows as a new file under the run folder, whole and on the disk when this returns."""
    first, last = int(rows.steps[0]), int(rows.steps[-1])
    path = _segment_path(folder, first, last)
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        with _open_writer(temporary) as file:
            file.write_table(_table(rows), row_group_size=_row_group_rows(rows.load.shape[1]))
        _commit_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Segment(first, last, path.name)


def read_rows(folder: Path, segment: Segment, within: tuple[int, int] | None = None) -> Rows:
    """All rows of a segment, or those of the row groups that hold steps `within` first..last.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the file is damaged; every page carries a checksum.
    """
    path = folder / FOLDER_NAME / segment.file
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            groups = list(range(file.num_row_groups))
            if within is not None:
                groups = [group for group in groups if _overlaps(file, group, *within)]
            return _rows(file.read_row_groups(groups, use_threads=False))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}".splitlines()[0]) from error


def list_segments(connection: sqlite3.Connection) -> list[Segment]:
    """The segments that count, in the order of their steps."""
    return [Segment(*row) for row in connection.execute("SELECT first, last, file FROM segments ORDER BY first")]


def find_segment(connection: sqlite3.Connection, step: int) -> Segment | None:
    """The segment that spans a step."""
    query = "SELECT first, last, file FROM segments WHERE first <= ? ORDER BY first DESC LIMIT 1"
    row = connection.execute(query, (step,)).fetchone()
    return None if row is None or row[1] < step else Segment(*row)


def read_step(connection: sqlite3.Connection, folder: Path, step: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Flat load and bias of a recorded step; None when no segment holds that step.

    Raises:
        ValueError: the segment that holds it is lost or damaged.
    """
    while (segment := find_segment(connection, step)) is not None:
        try:
            rows = read_rows(folder, segment, (step, step))
        except FileNotFoundError:
            # The writer replaces a partial segment by a longer one, lists that and deletes the old: look again.
            if find_segment(connection, step) == segment:
                raise ValueError(lost_line(folder, segment)) from None
            continue
        at = int(np.searchsorted(rows.steps, step))
        if at == len(rows.steps) or rows.steps[at] != step:
            return None
        return rows.load[at], rows.bias[at]
    return None


def lost_line(folder: Path, segment: Segment) -> str:
    """What to say about a listed segment whose file is gone."""
    path = folder / FOLDER_NAME / segment.file
    return f"the loads of steps {segment.first}..{segment.last} are lost: {path} is missing"


def plan_compaction(folder: Path, segments: list[Segment], row_values: int) -> list[list[Segment]]:
    """Runs of neighbouring segments, each to become one file; lost segments are left as they are."""
    most_rows = max(1, _COMPACTED_BYTES // max(1, row_values * 8))
    groups: list[list[Segment]] = [[]]
    for segment in segments:
        if not (folder / FOLDER_NAME / segment.file).is_file():
            groups.append([])
            continue
        if groups[-1] and segment.last - groups[-1][0].first >= most_rows:
            groups.append([])
        groups[-1].append(segment)
    return [group for group in groups if len(group) > 1]


def merge_segments(folder: Path, group: list[Segment], row_values: int) -> Segment:
    """Write neighbouring segments as one new file; the old files stay."""
    path = _segment_path(folder, group[0].first, group[-1].last)
    temporary = path.with_name(_TEMPORARY + path.name)
    rows_per_group = _row_group_rows(row_values)
    try:
        with _open_writer(temporary) as file:
            waiting: list[pa.Table] = []
            for segment in group:
                waiting.append(_table(read_rows(folder, segment)))
                if sum(len(table) for table in waiting) >= rows_per_group:
                    file.write_table(pa.concat_tables(waiting), row_group_size=rows_per_group)
                    waiting = []
            if waiting:
                file.write_table(pa.concat_tables(waiting), row_group_size=rows_per_group)
        _commit_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Segment(group[0].first, group[-1].last, path.name)


def delete_unlisted(folder: Path, segments: list[Segment]) -> None:
    """Delete every file of the arrays folder that no segment names: what a killed writer left."""
    listed = {segment.file for segment in segments}
    for path in (folder / FOLDER_NAME).iterdir():
        if path.name not in listed:
            path.unlink()


def _segment_path(folder: Path, first: int, last: int) -> Path:
    return folder / FOLDER_NAME / f"steps-{first:09d}-{last:09d}.parquet"


def _commit_file(temporary: Path, path: Path) -> None:
    fsync_file(temporary)
    os.replace(temporary, path)
    fsync_folder(path.parent)


_SCHEMA = pa.schema([("step", pa.int64()), ("load", pa.list_(pa.int32())), ("bias", pa.list_(pa.float32()))])


def _open_writer(path: Path) -> pq.ParquetWriter:
    # Split bytes compress counts and biases a seventh better than plain ones and are written faster (measured).
    return pq.ParquetWriter(
        path,
        _SCHEMA,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
        use_byte_stream_split=["load.list.element", "bias.list.element"],  # type: ignore[arg-type]
    )


def _row_group_rows(row_values: int) -> int:
    return max(50, _ROW_GROUP_BYTES // max(1, row_values * 8))


def _table(rows: Rows) -> pa.Table:
    offsets = np.arange(len(rows.steps) + 1, dtype=np.int32) * np.int32(rows.load.shape[1])
    columns = [
        pa.array(rows.steps, pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(rows.load.ravel(), pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(rows.bias.ravel(), pa.float32())),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _rows(table: pa.Table) -> Rows:
    steps = table["step"].to_numpy()
    return Rows(steps, _matrix(table["load"], len(steps)), _matrix(table["bias"], len(steps)))


def _matrix(column: pa.ChunkedArray, num_rows: int) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(num_rows, len(flat) // num_rows if num_rows else 0)


def _overlaps(file: pq.ParquetFile, group: int, first: int, last: int) -> bool:
    statistics = file.metadata.row_group(group).column(0).statistics
    return statistics is None or (statistics.min <= last and statistics.max >= first)
