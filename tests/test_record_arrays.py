"""Segments, their compaction, and questions to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench import record
from workbench.record import arrays, queries
from workbench.record.arrays import Rows, Segment
from workbench.train.events import Step

LAYERS, EXPERTS = ("layer_1", "layer_2", "layer_3"), 4


def rows_of(first: int, last: int, width: int = 12) -> Rows:
    rng = np.random.default_rng(first)
    steps = np.arange(first, last + 1)
    load = rng.integers(0, 2**31, (len(steps), width)).astype(np.int32)
    return Rows(steps, load, rng.normal(size=load.shape).astype(np.float32))


def step_event(step: int, load_LE: np.ndarray, bias_LE: np.ndarray) -> Step:
    return Step(
        step=step,
        tokens_seen=step * 64,
        epochs={},
        losses_nats={"next_token": 1.0 / step},
        total_loss_nats=1.0 / step,
        nats_per_byte=0.5,
        learning_rate=1e-3,
        balance_speed=1e-3,
        grad_norm=1.0,
        layer_names=LAYERS[: len(load_LE)],
        load_LE=load_LE,
        bias_LE=bias_LE,
        step_ms=1.0,
    )


def write_run(folder: Path, num_steps: int, num_layers: int = 3) -> tuple[record.RunWriter, np.ndarray, np.ndarray]:
    """An open run of `num_steps` random steps with the loads and biases that it was given."""
    rng = np.random.default_rng(num_steps)
    load_WLE = rng.integers(0, 1000, (num_steps, num_layers, EXPERTS))
    bias_WLE = rng.normal(size=load_WLE.shape).astype(np.float32)
    writer = record.RunWriter.create(
        folder,
        recipe_json="{}",
        seed=1,
        total_steps=num_steps,
        text_fingerprint="f",
        layer_names=LAYERS[:num_layers],
        num_experts=EXPERTS,
        hardware={},
    )
    for i in range(num_steps):
        writer.write(step_event(i + 1, load_WLE[i], bias_WLE[i]))
    return writer, load_WLE, bias_WLE


def assert_rows_equal(read: Rows, written: Rows) -> None:
    np.testing.assert_array_equal(read.steps, written.steps)
    np.testing.assert_array_equal(read.load, written.load)
    np.testing.assert_array_equal(read.bias, written.bias)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / arrays.FOLDER_NAME).mkdir()
    return tmp_path


def test_a_segment_holds_what_was_written_and_no_temporary_is_left(folder: Path) -> None:
    rows = rows_of(7, 56)
    rows.bias[0, :3] = [np.nan, np.inf, -0.0]
    segment = arrays.write_segment(folder, rows)
    assert segment == Segment(7, 56, "steps-000000007-000000056.parquet")
    assert_rows_equal(arrays.read_rows(folder, segment), rows)
    assert_rows_equal(arrays.read_rows(folder, segment, (1, 20)).where(rows.steps <= 20), rows.where(rows.steps <= 20))
    assert [path.name for path in (folder / "arrays").iterdir()] == [segment.file]


def test_compaction_keeps_every_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small limits, so that there are several files and several row groups in each: 96 bytes are one row.
    monkeypatch.setattr(arrays, "_ROW_GROUP_BYTES", 96 * 30)
    monkeypatch.setattr(arrays, "_COMPACTED_BYTES", 96 * 200)
    written = [rows_of(first, first + 49) for first in range(1, 501, 50)] + [rows_of(501, 503)]
    segments = [arrays.write_segment(folder, rows) for rows in written]
    groups = arrays.plan_compaction(folder, segments, 12)
    assert [len(group) for group in groups] == [4, 4, 3]
    merged = [arrays.merge_segments(folder, group, 12) for group in groups]
    read = [arrays.read_rows(folder, segment) for segment in merged]
    every = Rows(*(np.concatenate(parts) for parts in zip(*((r.steps, r.load, r.bias) for r in written), strict=True)))
    assert_rows_equal(
        Rows(*(np.concatenate(p) for p in zip(*((r.steps, r.load, r.bias) for r in read), strict=True))), every
    )
    # One row group is read for one step.
    one = arrays.read_rows(folder, merged[0], (120, 120))
    assert 120 in one.steps and len(one.steps) < 200
    assert arrays.plan_compaction(folder, merged, 12) == []


def test_a_flipped_bit_and_a_cut_file_are_found(folder: Path) -> None:
    segment = arrays.write_segment(folder, rows_of(1, 50))
    path = folder / "arrays" / segment.file
    content = path.read_bytes()
    for place in (len(content) // 4, len(content) // 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="cannot be read"):
            arrays.read_rows(folder, segment)
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        arrays.read_rows(folder, segment)


def test_loads_between_equal_what_was_written_before_and_after_closing(tmp_path: Path) -> None:
    writer, load_WLE, bias_WLE = write_run(tmp_path / "run", 130)
    writer.flush()
    for _ in ("segments", "compacted"):
        loads = record.loads_between(tmp_path / "run", 20, 120, every=10)
        np.testing.assert_array_equal(loads.steps, np.arange(20, 121, 10))
        np.testing.assert_array_equal(loads.load_WLE, load_WLE[19:120:10])
        np.testing.assert_array_equal(loads.bias_WLE, bias_WLE[19:120:10])
        np.testing.assert_array_equal(record.loads_between(tmp_path / "run").load_WLE, load_WLE)
        writer.close()
    assert len(list((tmp_path / "run" / "arrays").iterdir())) == 1
    with pytest.raises(ValueError, match="every=0"):
        record.loads_between(tmp_path / "run", every=0)


def test_a_query_takes_parameters_and_refuses_nonsense(tmp_path: Path) -> None:
    writer, load_WLE, _ = write_run(tmp_path / "run", 60)
    writer.close()
    table = record.query(tmp_path / "run", "SELECT sum(load[$1]) AS total FROM arrays", [1 * EXPERTS + 2 + 1])
    assert table["total"].to_pylist() == [int(load_WLE[:, 1, 2].sum())]
    with pytest.raises(ValueError, match="cannot be answered"):
        record.query(tmp_path / "run", "SELECT nothing FROM arrays")


def test_a_run_without_experts_or_without_steps(tmp_path: Path) -> None:
    writer, _, _ = write_run(tmp_path / "dense", 3, num_layers=0)
    writer.flush()
    for _ in ("open", "closed"):
        assert record.loads_between(tmp_path / "dense").load_WLE.shape == (3, 0, EXPERTS)
        assert record.Tail(tmp_path / "dense").load_at(2).shape == (0, EXPERTS)
        writer.close()
    writer, _, _ = write_run(tmp_path / "empty", 0)
    assert record.loads_between(tmp_path / "empty").load_WLE.shape == (0, 3, EXPERTS)
    with pytest.raises(ValueError, match="holds no loads yet"):
        record.Tail(tmp_path / "empty").load_at(1)
    writer.close()


def test_a_lost_segment_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    writer, load_WLE, _ = write_run(tmp_path / "run", 120)
    writer.flush()
    tail = record.Tail(tmp_path / "run")
    lost = tmp_path / "run" / "arrays" / "steps-000000101-000000120.parquet"
    lost.unlink()
    snapshot = tail.snapshot()
    assert (snapshot.step, snapshot.load_step) == (120, 100)
    np.testing.assert_array_equal(snapshot.load_LE, load_WLE[99])
    asks: list[Callable[[], object]] = [
        lambda: tail.load_at(110),
        lambda: record.loads_between(tmp_path / "run"),
        lambda: record.query(tmp_path / "run", "SELECT max(load[1]) FROM arrays"),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"steps 101\.\.120 are lost"):
            ask()
    np.testing.assert_array_equal(tail.load_at(50), load_WLE[49])
    writer.close()
    with record.RunWriter.reopen(tmp_path / "run", 110) as writer:
        writer.write(step_event(111, load_WLE[0], np.zeros((3, 4))))
    np.testing.assert_array_equal(record.Tail(tmp_path / "run").load_at(111), load_WLE[0])
    with pytest.raises(ValueError, match=r"steps 101\.\.110 are lost"):
        record.Tail(tmp_path / "run").load_at(110)


def test_a_segment_replaced_while_it_is_read_is_looked_up_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, load_WLE, _ = write_run(tmp_path / "run", 10)
    writer.flush()
    read_rows, answer = arrays.read_rows, queries._answer

    def replace_partial_segment() -> None:
        monkeypatch.undo()
        step = writer.history.snapshot().step + 1
        writer.write(step_event(step, load_WLE[0], np.zeros((3, 4))))
        writer.flush()

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            replace_partial_segment()
            return function(*arguments)

        return act

    monkeypatch.setattr(arrays, "read_rows", late(read_rows))
    np.testing.assert_array_equal(record.Tail(tmp_path / "run").load_at(7), load_WLE[6])
    monkeypatch.setattr(queries, "read_rows", late(read_rows))
    assert len(record.loads_between(tmp_path / "run").steps) == 12
    monkeypatch.setattr(queries, "_answer", late(answer))
    assert len(record.query(tmp_path / "run", "SELECT step FROM arrays")) == 13
    writer.close()


def test_a_reader_beside_the_writer_sees_whole_commits_only(tmp_path: Path) -> None:
    writer, load_WLE, _ = write_run(tmp_path / "run", 1)
    ended, wrong = threading.Event(), []

    def read_along() -> None:
        tail = record.Tail(tmp_path / "run")
        while not ended.is_set():
            snapshot = tail.snapshot()
            steps = list(range(1, snapshot.step + 1))
            if snapshot.series and snapshot.series["next_token"].steps.tolist() != steps:
                wrong.append(f"series at step {snapshot.step}")
            loads = [(snapshot.load_step, snapshot.load_LE)]
            loads += [(step, tail.load_at(step)) for step in (1, snapshot.step // 2) if step and snapshot.load_step]
            wrong.extend(step for step, load in loads if step and not (load == load_WLE[0] + step - 1).all())

    with ThreadPoolExecutor() as threads:
        reader = threads.submit(read_along)
        for step in range(2, 161):
            writer.write(step_event(step, load_WLE[0] + step - 1, np.zeros((3, 4))))
            writer.flush()
        writer.close()
        ended.set()
        reader.result()
    assert wrong == []


def test_a_segment_ahead_of_the_commit_does_not_count(tmp_path: Path) -> None:
    writer, load_WLE, _ = write_run(tmp_path / "run", 50)
    writer.flush()
    arrays.write_segment(tmp_path / "run", rows_of(51, 80))
    tail = record.Tail(tmp_path / "run")
    assert (tail.snapshot().step, tail.snapshot().load_step) == (50, 50)
    with pytest.raises(ValueError, match="newest readable step is 50"):
        tail.load_at(60)
    assert len(record.loads_between(tmp_path / "run").steps) == 50
    writer.close()
    record.RunWriter.reopen(tmp_path / "run", 50).close()
    assert len(list((tmp_path / "run" / "arrays").iterdir())) == 1
    np.testing.assert_array_equal(record.loads_between(tmp_path / "run").load_WLE, load_WLE)
