"""Writing, reading along, resuming and steering a run folder."""

from __future__ import annotations

import gc
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import workbench.record.writer as writer_module
from workbench import record
from workbench.train.events import Change, Checkpoint, Evaluation, Event, Spike, Step

LAYERS, EXPERTS = ("layer_1", "layer_2"), 4


def create(folder: Path, total_steps: int = 200) -> record.RunWriter:
    return record.RunWriter.create(
        folder,
        recipe_json='{"kind": "Recipe",  "seed": 7}',
        seed=7,
        total_steps=total_steps,
        text_fingerprint="f00d",
        layer_names=LAYERS,
        num_experts=EXPERTS,
        hardware={"threads": 2},
    )


def step_event(step: int, **other: Any) -> Step:
    rng = np.random.default_rng(step)
    fields: dict[str, Any] = {
        "step": step,
        "tokens_seen": step * 64,
        "epochs": {"code": step / 100, "prose": step / 50},
        "losses_nats": {"next_token": 5 / step, "mtp_1": math.nan, "balance": 0.01, "z": math.inf},
        "total_loss_nats": 6 / step,
        "nats_per_byte": 1 / 3 / step,
        "learning_rate": 1e-3,
        "balance_speed": 1e-3,
        "grad_norm": 0.1 + step,
        "layer_names": LAYERS,
        "load_LE": rng.integers(0, 100, (2, 4)),
        "bias_LE": rng.normal(size=(2, 4)).astype(np.float32),
        "step_ms": 10.0,
    }
    return Step(**fields | other)


def evaluation_event(step: int) -> Evaluation:
    return Evaluation(
        step=step,
        nats_per_token=2.5,
        nats_per_byte=1.25,
        nats_per_byte_by_corpus={"float": 1.0, "prose": math.nan},
        floors_nats_per_byte={"uniform": 8.0, "unigram": 4.0, "bigram": 3.0},
        floors_nats_per_token={"uniform": 8.0, "unigram": 4.5, "bigram": 3.5},
        mtp_accuracy={1: 0.5},
        distance_bigram_accuracy={1: 0.25},
        load_by_corpus_LE={"code": np.full((2, 4), step), "prose": np.zeros((2, 4), np.int32)},
        sample=f"def f(\0):\n\té {step}",
    )


def events(first: int, last: int) -> list[Event]:
    """Steps with an evaluation every 20 and a spike every 30."""
    told: list[Event] = []
    for step in range(first, last + 1):
        told.append(step_event(step))
        if step % 30 == 0:
            told.append(Spike(step=step, loss_nats=9.0, threshold_nats=3.0))
        if step % 20 == 0:
            told.append(evaluation_event(step))
    return told


def plain(snapshot: record.Snapshot) -> dict[str, Any]:
    """Everything that a snapshot says but version, as values that compare."""

    def evaluation(event: Evaluation) -> dict[str, Any]:
        loads = {corpus: load.tolist() for corpus, load in event.load_by_corpus_LE.items()}
        return {**vars(event), "load_by_corpus_LE": loads}

    return {
        **{name: getattr(snapshot, name) for name in ("folder", "name", "status", "message", "step", "total_steps")},
        **{name: getattr(snapshot, name) for name in ("layer_names", "load_step", "spikes", "changes")},
        # As text, so that NaN equals NaN, order counts and a float must be the very same.
        "series": repr([(name, s.steps.tolist(), s.values.tolist()) for name, s in snapshot.series.items()]),
        "evaluations": repr([evaluation(event) for event in snapshot.evaluations]),
        "load": (snapshot.load_LE.dtype, snapshot.load_LE.tolist()),
        "bias": (snapshot.bias_LE.dtype, snapshot.bias_LE.tolist()),
    }


def rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(folder / "run.sqlite")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_a_tail_says_what_the_history_of_the_writer_says(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        tail = record.Tail(tmp_path / "run")
        assert plain(tail.snapshot()) == plain(writer.history.snapshot())
        writer.status("running")
        writer.write(evaluation_event(0))
        for event in events(1, 130):
            writer.write(event)
            if isinstance(event, Step) and event.step % 37 == 0:
                writer.flush()
                assert plain(tail.snapshot()) == plain(writer.history.snapshot())
        tail.snapshot()
        writer.status("paused", "by hand")
        assert plain(tail.snapshot()) == plain(writer.history.snapshot())
        snapshot = writer.history.snapshot()
        assert (snapshot.status, snapshot.message, snapshot.step, snapshot.load_step) == ("paused", "by hand", 130, 130)
        losses = ["next_token", "mtp_1", "balance", "z", "total", "nats_per_byte"]
        settings = [
            "learning_rate",
            "balance_speed",
            "grad_norm",
            "step_ms",
            "tokens_seen",
            "epochs/code",
            "epochs/prose",
        ]
        assert list(snapshot.series) == losses + settings
        assert snapshot.series["nats_per_byte"].values[2] == 1 / 3 / 3
        assert snapshot.evaluations[-1].sample == "def f(\0):\n\té 120"
        assert [spike.step for spike in snapshot.spikes] == [30, 60, 90, 120]
    assert plain(record.Tail(tmp_path / "run").snapshot()) == plain(writer.history.snapshot())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        {"run.sqlite", "recipe.json", "environment.json", "arrays", "checkpoints"}
        | ({"git.diff"} if (tmp_path / "run" / "git.diff").exists() else set())
    )
    assert (tmp_path / "run" / "recipe.json").read_text() == '{"kind": "Recipe",  "seed": 7}'
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["text_fingerprint"] == "f00d"


def test_the_version_changes_when_and_only_when_something_did(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        tail = record.Tail(tmp_path / "run")
        for source in (tail, writer.history):
            seen = source.snapshot()
            assert source.snapshot() is seen
            acts: list[Callable[[], object]] = [
                lambda: writer.status("running"),
                lambda n=seen.step: writer.write(step_event(n + 1)),
                lambda n=seen.step: writer.write(Spike(step=n + 1, loss_nats=1.0, threshold_nats=0.5)),
                lambda n=seen.step: writer.write(evaluation_event(n + 1)),
                lambda: writer.status("paused"),
            ]
            for act in acts:
                act()
                writer.flush()
                now = source.snapshot()
                assert now.version > seen.version
                writer.flush()
                writer.status(now.status, now.message)
                assert source.snapshot() is now
                seen = now


def test_an_older_snapshot_stays_as_it_was_and_cannot_be_written(tmp_path: Path) -> None:
    with create(tmp_path / "run", total_steps=2000) as writer:
        writer.write(step_event(1))
        before = writer.history.snapshot()
        was = plain(before)
        buffer = before.series["total"].values.base
        for step in range(2, 200):
            writer.write(step_event(step))
        # The buffers are shared, not copied, until they have to grow.
        assert writer.history.snapshot().series["total"].values.base is buffer
        for step in range(200, 700):
            writer.write(step_event(step))
        assert plain(before) == was
        assert len(writer.history.snapshot().series["total"].values) == 699
        for array in (before.load_LE, before.bias_LE, before.series["total"].values):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_steps_are_committed_by_50_or_by_2_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(writer_module, "monotonic", lambda: now[0])
    with create(tmp_path / "run") as writer:
        tail = record.Tail(tmp_path / "run")
        seen = []
        for step in range(1, 121):
            if step in (60, 61):
                now[0] += 2.0
            writer.write(step_event(step))
            seen.append(tail.snapshot().step)
        commits = [step for step, newest in enumerate(seen, 1) if newest == step]
        assert commits == [50, 60, 61, 100]
        files = [path.name for path in (tmp_path / "run" / "arrays").iterdir()]
        assert sorted(files) == ["steps-000000001-000000050.parquet", "steps-000000051-000000100.parquet"]
        np.testing.assert_array_equal(tail.load_at(75), step_event(75).load_LE)
        np.testing.assert_array_equal(writer.load_at(115), step_event(115).load_LE)
        with pytest.raises(ValueError, match=r"newest readable step is 100 \(the running process writes newer"):
            tail.load_at(115)
        with pytest.raises(ValueError, match="newest step is 120"):
            writer.load_at(121)
        with pytest.raises(ValueError, match="the oldest 1"):
            tail.load_at(0)
        writer.write(Checkpoint(step=120, state=None))
        assert tail.snapshot().step == 120
    for source in (writer, tail):
        for step in (1, 50, 51, 120):
            np.testing.assert_array_equal(source.load_at(step), step_event(step).load_LE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 160 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "whole"
    with create(folder) as writer:
        for event in events(1, 160):
            writer.write(event)
        writer.status("finished")
    return folder


@pytest.mark.parametrize("cut", [0, 1, 40, 100, 119, 120])
@pytest.mark.parametrize("closed_before", [True, False], ids=["closed", "killed"])
def test_a_resumed_record_equals_an_uninterrupted_one(
    tmp_path: Path, whole: Path, cut: int, closed_before: bool
) -> None:
    writer = create(tmp_path / "cut")
    for event in events(1, 119):
        writer.write(event)
    writer.write(step_event(120, learning_rate=0.5, load_LE=np.full((2, 4), 77)))
    controls = record.Controls(tmp_path / "cut")
    controls.set(learning_rate=0.5)
    writer.applied(controls.pending()[0].id, 121)
    controls.stop()
    tail = record.Tail(tmp_path / "cut")
    assert tail.snapshot().step == 120
    if closed_before:
        writer.close()
    else:
        writer.flush()
        del writer
        gc.collect()
        (tmp_path / "cut" / "arrays" / "steps-000000121-000000150.parquet").write_bytes(b"torn")
        (tmp_path / "cut" / "arrays" / ".tmp-steps-000000151-000000160.parquet").write_bytes(b"torn")
    (tmp_path / "cut" / "checkpoints" / "step-000000090").mkdir()
    with record.RunWriter.reopen(tmp_path / "cut", cut) as writer:
        assert plain(tail.snapshot()) == plain(writer.history.snapshot())
        assert tail.snapshot().step == cut
        assert controls.pending() == ()
        kept = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
        assert kept == (["step-000000090"] if cut >= 90 else [])
        for event in events(cut + 1, 160):
            # Step 120 was special before, not now; at cut 120 it is kept as it was.
            writer.write(event)
        writer.status("finished")
    if cut == 120:
        # Given to the very state that the run goes on from; the Stop that it never saw is gone.
        assert tail.snapshot().changes == ((121, "learning_rate", 0.5),)
        assert rows(tmp_path / "cut", "SELECT kind, applied_step FROM controls") == [("set", 121)]
        assert tail.load_at(120).tolist() == [[77] * 4] * 2
        return
    for table in ("scalars", "evaluations", "samples", "spikes", "changes", "controls", "segments"):
        sql = f"SELECT * FROM {table} ORDER BY 1, 2"
        assert rows(tmp_path / "cut", sql) == rows(whole, sql)
    expected, continued = record.loads_between(whole), record.loads_between(tmp_path / "cut")
    for name in ("steps", "load_WLE", "bias_WLE"):
        np.testing.assert_array_equal(getattr(continued, name), getattr(expected, name))
    other = {"folder", "name"}
    for source in (tail, record.Tail(tmp_path / "cut")):
        said, expected = plain(source.snapshot()), plain(record.Tail(whole).snapshot())
        assert {k: v for k, v in said.items() if k not in other} == {
            k: v for k, v in expected.items() if k not in other
        }
    assert rows(tmp_path / "cut", "SELECT at_step FROM sessions") == [(0,), (cut,)]


def test_reopen_keeps_what_was_set_for_the_next_step_and_no_other_control(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        controls = record.Controls(tmp_path / "run")
        for step in (1, 2, 3):
            controls.pause()
            controls.set(learning_rate=step / 8)
            for control in controls.pending():
                writer.applied(control.id, step)
            writer.write(step_event(step))
    with record.RunWriter.reopen(tmp_path / "run", 1) as writer:
        kept = ((1, "learning_rate", 0.125), (2, "learning_rate", 0.25))
        assert writer.history.snapshot().changes == record.Tail(tmp_path / "run").snapshot().changes == kept
        applied = rows(tmp_path / "run", "SELECT kind, applied_step FROM controls ORDER BY id")
        assert applied == [("pause", 1), ("set", 1), ("set", 2)]


def test_a_balance_speed_is_refused_where_no_bias_balances(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        controls = record.Controls(tmp_path / "run")
        (tmp_path / "run" / "recipe.json").write_text('{"balance": {"kind": "AuxiliaryLoss"}}')
        with pytest.raises(ValueError, match="run balances by AuxiliaryLoss: it has no balance_speed to set"):
            controls.set(balance_speed=0.1, learning_rate=0.1)
        controls.set(learning_rate=0.1)
        (tmp_path / "run" / "recipe.json").write_text('{"balance": {"kind": "LossFreeBias"}}')
        controls.set(balance_speed=0.1)
        assert len(controls.pending()) == 2


def test_reopen_refuses_a_step_beyond_the_record_and_takes_more_steps(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.write(step_event(1))
    for at_step in (2, -1):
        with pytest.raises(ValueError, match=rf"at_step={at_step} must lie in 0\.\.1"):
            record.RunWriter.reopen(tmp_path / "run", at_step)
    with record.RunWriter.reopen(tmp_path / "run", 1, total_steps=999) as writer:
        assert record.Tail(tmp_path / "run").snapshot().total_steps == 999
    with pytest.raises(ValueError, match="not a run folder"):
        record.RunWriter.reopen(tmp_path / "nowhere", 0)


def test_wrong_events_are_refused_and_leave_no_trace(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.write(step_event(5))
        writer.write(evaluation_event(5))
        before = plain(writer.history.snapshot())
        wrong: list[tuple[str, Event]] = [
            ("cannot follow", step_event(5)),
            ("cannot follow", evaluation_event(4)),
            ("layer_names", step_event(6, layer_names=("other", "names"))),
            (r"shape \(1, 4\)", step_event(6, load_LE=np.zeros((1, 4), int))),
            ("float64", step_event(6, load_LE=np.zeros((2, 4)))),
            (r"must lie in 0\.\.", step_event(6, load_LE=np.full((2, 4), -1))),
            (r"must lie in 0\.\.", step_event(6, load_LE=np.full((2, 4), 2**31))),
            ("bias has shape", step_event(6, bias_LE=np.zeros((4, 2)))),
            ("'total' has the name", step_event(6, losses_nats={"total": 1.0})),
        ]
        for reason, event in wrong:
            with pytest.raises(ValueError, match=reason):
                writer.write(event)
        with pytest.raises(ValueError, match="'orphaned' must be one of"):
            writer.status("orphaned")
        assert plain(writer.history.snapshot()) == before
        writer.flush()
        assert plain(record.Tail(tmp_path / "run").snapshot()) == before
    with pytest.raises(ValueError, match="closed"):
        writer.write(step_event(6))
    with pytest.raises(ValueError, match="exists already"):
        create(tmp_path / "run")
    with pytest.raises(ValueError, match="not allowed"):
        create(tmp_path / "runs" / "..")
    with pytest.raises(ValueError, match="total_steps=-1"):
        create(tmp_path / "negative", total_steps=-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    writer = create(tmp_path / "run")
    with pytest.raises(ValueError, match="already being written by this process"):
        record.RunWriter.reopen(tmp_path / "run", 0)
    code = "import sys; from workbench import record; record.RunWriter.reopen(sys.argv[1], 0)"
    environment = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parents[2])}
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert f"is being written by process {os.getpid()}; stop that run first" in other.stderr
    writer.write(step_event(1))
    writer.close()
    writer.close()
    # A writer that is dropped without being closed does not lock the folder.
    dropped = record.RunWriter.reopen(tmp_path / "run", 1)
    del dropped
    gc.collect()
    record.RunWriter.reopen(tmp_path / "run", 1).close()


def claim_by(folder: Path, host: str, pid: int, started: str) -> None:
    connection = sqlite3.connect(folder / "run.sqlite")
    connection.execute("INSERT OR REPLACE INTO writer VALUES (1, ?, ?, ?, 'x')", (host, pid, started))
    connection.execute("UPDATE status SET state = 'running', commits = commits + 1")
    connection.commit()
    connection.close()


def test_a_dead_writer_is_an_orphan_and_taken_over_and_a_reused_id_fools_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with create(folder) as writer:
        writer.write(step_event(1))
    from workbench.record.process import this_process

    me = this_process()
    tail = record.Tail(folder)
    claim_by(folder, me.host, os.getppid() if me.started else 2**22 + 1, "another-boot:1" if me.started else "")
    assert tail.snapshot().status == "orphaned"
    assert record.runs(tmp_path)[0].status == "orphaned"
    with pytest.raises(ValueError, match="is orphaned: nothing is left to pause; resume the run first"):
        record.Controls(folder).pause()
    with record.RunWriter.reopen(folder, 1) as writer:
        assert tail.snapshot().status == "starting"
    claim_by(folder, "another-host", 1, "")
    assert tail.snapshot().status == "running"
    with pytest.raises(ValueError, match="cannot be asked from here"):
        record.RunWriter.reopen(folder, 1)
    writer = record.RunWriter.reopen(folder, 1, take_over=True)
    usurper = record.RunWriter.reopen(folder, 1, take_over=True)
    writer.write(step_event(2))
    with pytest.raises(RuntimeError, match="taken over by another writer"):
        writer.flush()
    usurper.write(step_event(2))
    usurper.close()
    with pytest.raises(RuntimeError, match="taken over by another writer"):
        writer.close()
    assert tail.snapshot().step == 2


def test_controls_are_applied_in_order_and_recorded_with_their_step(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.status("running")
        controls, trainer = record.Controls(tmp_path / "run"), record.Controls(str(tmp_path / "run"))
        tail = record.Tail(tmp_path / "run")
        before = tail.snapshot()
        controls.pause()
        controls.set(learning_rate=0.25)
        controls.step()
        controls.set(balance_speed=0.0, learning_rate=0.125)
        controls.resume()
        controls.stop()
        assert tail.snapshot() is before
        pending = trainer.pending()
        assert [control.kind for control in pending] == ["pause", "set", "step", "set", "resume", "stop"]
        assert pending[1].change == Change(learning_rate=0.25)
        assert pending[3].change == Change(learning_rate=0.125, balance_speed=0.0)
        for step, control in enumerate(pending, 11):
            writer.write(step_event(step - 1))
            writer.applied(control.id, step)
            assert tail.snapshot().step == step - 1
        assert trainer.pending() == ()
        changes = ((12, "learning_rate", 0.25), (14, "learning_rate", 0.125), (14, "balance_speed", 0.0))
        assert tail.snapshot().changes == changes
        assert writer.history.snapshot().changes == changes
        assert rows(tmp_path / "run", "SELECT kind, applied_step FROM controls") == [
            (control.kind, step) for step, control in enumerate(pending, 11)
        ]
        with pytest.raises(ValueError, match="is not pending"):
            trainer.applied(pending[0].id, 20)
        with pytest.raises(ValueError, match="must be a positive finite number"):
            controls.set(learning_rate=-1.0)
        with pytest.raises(ValueError, match="must set"):
            controls.set()
        writer.status("finished")
    for act in (controls.pause, controls.resume, controls.step, controls.stop, lambda: controls.set(learning_rate=1.0)):
        with pytest.raises(ValueError, match="run is finished"):
            act()
    with pytest.raises(ValueError, match="not a run folder"):
        record.Controls(tmp_path)


def test_the_observers_of_a_tail_are_called_once_at_the_end(tmp_path: Path) -> None:
    writer = create(tmp_path / "run")
    tail = record.Tail(tmp_path / "run")
    calls: list[str] = []
    tail.on_end(lambda: calls.append("early"))
    tail.snapshot()
    assert calls == []
    writer.status("failed", "loss became NaN")
    writer.close()
    assert (tail.snapshot().status, tail.snapshot().message) == ("failed", "loss became NaN")
    tail.on_end(lambda: calls.append("late"))
    tail.snapshot()
    assert calls == ["early", "late"]


def test_open_source_passes_a_source_and_opens_a_path(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        tail = record.open_source(tmp_path / "run")
        assert isinstance(tail, record.Tail) and isinstance(tail, record.Source)
        assert not tail.live
        assert record.open_source(tail) is tail
        assert record.open_source(str(tmp_path / "run")).folder == tmp_path / "run"
    with pytest.raises(ValueError, match="int is neither a run nor the path"):
        record.open_source(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a run folder"):
        record.open_source(tmp_path / "nowhere")


def test_a_run_of_the_same_name_made_anew_is_read_anew(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.write(step_event(1))
    tail = record.Tail(tmp_path / "run")
    old = tail.snapshot()
    record.delete(tmp_path, "run")
    with pytest.raises(ValueError, match="not a run folder"):
        tail.snapshot()
    with create(tmp_path / "run") as writer:
        writer.write(step_event(1, grad_norm=9.0))
    assert tail.snapshot().version > old.version
    assert tail.snapshot().series["grad_norm"].values.tolist() == [9.0]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_record_run import create, step_event
from workbench import record
import numpy as np
folder = Path(sys.argv[2]) / "run"
writer = create(folder)
for step in range(1, 61):
    writer.write(step_event(step))
writer.flush()
size = (folder / "run.sqlite-wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
for step in range(61, 100):
    writer.write(step_event(step))
try:
    writer.flush()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(record.Tail(folder).snapshot().step)
writer.write(step_event(100))
writer.close()
tail = record.Tail(folder)
print(tail.snapshot().step, all((tail.load_at(s) == step_event(s).load_LE).all() for s in range(1, 101)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no RLIMIT_FSIZE")
def test_a_full_disk_is_one_line_and_what_was_committed_stays(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, __file__, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    line, committed, after = done.stdout.splitlines()
    assert line.startswith("steps 61..99 could not be recorded in ")
    assert line.endswith("everything up to step 60 is kept")
    assert (committed, after) == ("60", "100 True")


def test_record_needs_no_torch() -> None:
    code = "import sys, workbench.record; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("content", [b"\0", b"\xff", b"\x0d"])
def test_a_damaged_page_is_one_line_and_hides_no_other_run(tmp_path: Path, content: bytes):
    for name in ("whole", "harmed"):
        with create(tmp_path / name) as writer:
            for event in events(1, 60):
                writer.write(event)
    path = tmp_path / "harmed" / "run.sqlite"
    connection = sqlite3.connect(path)
    page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'"))
    connection.close()
    good, harmed = path.read_bytes(), tmp_path / "harmed"
    line = r"harmed.run\.sqlite (cannot be read as a run database|has lost)"
    reads: dict[str, Callable[[], object]] = {
        "status": lambda: record.Tail(harmed),
        "scalars": lambda: record.Tail(harmed).snapshot(),
        "evaluations": lambda: record.open_source(harmed).snapshot(),
        "segments": lambda: record.Tail(harmed).load_at(3),
        "controls": lambda: record.Controls(harmed).pending(),
        "writer": lambda: record.RunWriter.reopen(harmed, 60),
    }
    for table, read in reads.items():
        start = (roots[table] - 1) * page_bytes
        path.write_bytes(good[:start] + content * page_bytes + good[start + page_bytes :])
        with pytest.raises(ValueError, match=line) as caught:
            read()
        assert "\n" not in str(caught.value)
        listed = {run.name: run.status for run in record.runs(tmp_path)}
        assert set(listed) == {"whole", "harmed"} and listed["whole"] != "unreadable"
        if table == "status":
            assert listed["harmed"] == "unreadable"


def test_a_damaged_cell_makes_a_run_unreadable_and_hides_no_other(tmp_path: Path):
    for name in ("whole", "harmed", "lost"):
        create(tmp_path / name).close()
    for name, statement in (
        ("harmed", "UPDATE meta SET value = '5' WHERE key = 'created'"),
        ("lost", "DELETE FROM meta WHERE key = 'seed'"),
    ):
        connection = sqlite3.connect(tmp_path / name / "run.sqlite")
        with connection:
            connection.execute(statement)
        connection.close()
    unreadable = {run.name for run in record.runs(tmp_path) if run.status == "unreadable"}
    assert unreadable == {"harmed", "lost"}
    with pytest.raises(ValueError, match=r"lost.run\.sqlite has lost seed$"):
        record.Tail(tmp_path / "lost")


def cells(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    found = [(t, row[1]) for t in tables for row in connection.execute(f"PRAGMA table_info({t})") if row[1] != "id"]
    connection.close()
    return [cell for cell in found if not cell[0].startswith("sqlite_")]


@pytest.mark.parametrize("content", [b"\xff\x00", "word", "[1]", '{"a": 1}', 1e300, -7])
def test_a_cell_of_a_wrong_kind_is_read_or_is_one_line(tmp_path: Path, content: object):
    folder = tmp_path / "harmed"
    with create(folder) as writer:
        writer.status("running")
        for event in events(1, 60):
            writer.write(event)
        record.Controls(folder).set(learning_rate=1e-3)
    path = folder / "run.sqlite"
    good = path.read_bytes()
    reads: dict[str, Callable[[], object]] = {
        "snapshot": lambda: record.Tail(folder).snapshot(),
        "load": lambda: record.Tail(folder).load_at(3),
        "controls": lambda: record.Controls(folder).pending(),
        "runs": lambda: list(record.runs(tmp_path)),
    }
    refused = 0
    for table, column in cells(path):
        path.write_bytes(good)
        connection = sqlite3.connect(path)
        with connection, suppress(sqlite3.IntegrityError):  # some cells cannot hold it
            row = "(SELECT MAX(rowid) FROM {0})" if table not in ("meta", "scalars") else None
            where = f"rowid = {row.format(table)}" if row else f"{column} = (SELECT MAX({column}) FROM {table})"
            connection.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE {where}", (content,))
        connection.close()
        for name, read in reads.items():
            try:
                read()
            except ValueError as error:
                assert name != "runs", f"{table}.{column}: a damaged run hides the others"
                line = str(error)
                assert "\n" not in line and ("harmed" in line or "no load of step 3" in line), (
                    f"{table}.{column}: {line}"
                )
                refused += 1
    assert refused > 0
