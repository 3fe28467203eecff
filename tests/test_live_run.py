"""A run in the background: steering, recording, ending. Nothing here sleeps; everything waits for a state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_recipe

from workbench import live
from workbench.live.launch import stop_running
from workbench.record import Controls, Snapshot, Source, Tail, checkpoint
from workbench.record.database import connect
from workbench.text import Files, InductionTask, Mixture, ModularArithmeticTask, Text, load
from workbench.train.recipes import Recipe

PATIENCE = 60.0


def tiny(steps: int = 10_000, **changes: object) -> Recipe:
    """Some milliseconds a step, and neither evaluations nor checkpoints on the way."""
    small = Mixture({ModularArithmeticTask(num_documents=300): 1.0, InductionTask(num_documents=100): 1.0})
    quiet = {"evaluate_every": 10_000, "checkpoint_every": 10_000, "evaluation_batches": 1, "sample_tokens": 0}
    return tiny_recipe(**{"steps": steps, "batch_size": 2, "text": small, **quiet, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return load(tiny().text, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_left_running():
    threads = torch.get_num_threads()
    yield
    stop_running("the test is over", PATIENCE)
    torch.set_num_threads(threads)


def is_paused(now: Snapshot) -> bool:
    return now.status == "paused"


def paused_at(step: int):
    return lambda now: now.status == "paused" and now.step == step


def test_a_run_finishes_and_memory_and_folder_agree(tmp_path, text):
    run = live.start(tiny(steps=6), tmp_path / "run", text=text)
    assert isinstance(run, Source)
    assert run.wait(PATIENCE) == "finished"
    ours, theirs = run.snapshot(), Tail(tmp_path / "run").snapshot()
    assert (theirs.status, theirs.step, theirs.total_steps) == ("finished", 6, 6)
    assert [e.step for e in ours.evaluations] == [e.step for e in theirs.evaluations] == [0, 6]
    assert list(ours.series) == list(theirs.series)
    for name, series in ours.series.items():
        np.testing.assert_array_equal(series.steps, [1, 2, 3, 4, 5, 6])
        np.testing.assert_array_equal(series.values, theirs.series[name].values)
    np.testing.assert_array_equal(run.load_at(3), Tail(tmp_path / "run").load_at(3))
    assert run.load_at(3).sum() == 2 * 2 * 32 * 2  # layers x sequences x tokens x choices
    assert "finished, step 6 of 6" in repr(run)


def test_a_thread_count_left_open_is_recorded_as_the_number_that_is_used(tmp_path, text, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr("workbench.train.loop.torch.set_num_threads", used.append)
    assert live.start(tiny(steps=1, num_threads=1), tmp_path / "first", text=text).wait(PATIENCE) == "finished"
    here = torch.get_num_threads()
    run = live.start(tiny(steps=2, num_threads=None), tmp_path / "second", text=text, paused=True)
    run.step()
    run.wait_for(paused_at(1), PATIENCE)
    run.stop()
    run.wait(PATIENCE)
    assert Recipe.from_json((tmp_path / "second" / "recipe.json").read_text()).num_threads == here
    assert live.resume(tmp_path / "second", text=text).wait(PATIENCE) == "finished"
    assert used == [1, here, here]


def test_paused_from_the_start_nothing_is_done_and_step_makes_exactly_one(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text, paused=True)
    assert run.wait_for(is_paused, PATIENCE).step == 0
    assert run.snapshot().evaluations == ()
    for expected in (1, 2, 3):
        run.step()
        run.wait_for(paused_at(expected), PATIENCE)
    # A control that changes no pace is applied while the recorded steps stand still: the trainer looked and stayed.
    run.set(balance_speed=0.5)
    run.wait_for(lambda now: len(now.changes) == 1, PATIENCE)
    assert is_paused(run.snapshot())
    np.testing.assert_array_equal(Tail(run.folder).snapshot().series["total"].steps, [1, 2, 3])


def test_pause_resume_stop_and_the_steps_at_which_they_were_applied(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text)
    run.wait_for(lambda now: now.step >= 2, PATIENCE)
    run.pause()
    held = run.wait_for(is_paused, PATIENCE).step
    run.resume()
    run.wait_for(lambda now: now.step >= held + 2, PATIENCE)
    run.stop()
    assert run.wait(PATIENCE) == "stopped"
    last = run.snapshot().step
    rows = applied_controls(run.folder)
    assert rows == [("pause", held + 1), ("resume", held + 1), ("stop", last + 1)]
    assert checkpoint.latest(run.folder) == last
    assert Tail(run.folder).snapshot().status == "stopped"


def applied_controls(folder: Path) -> list[tuple[str, int]]:
    with closing(connect(folder, "ro")) as connection:
        return connection.execute("SELECT kind, applied_step FROM controls ORDER BY id").fetchall()


def test_step_of_a_running_run_makes_one_more_and_pauses(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text)
    run.wait_for(lambda now: now.step >= 1, PATIENCE)
    run.step()
    now = run.wait_for(is_paused, PATIENCE)
    assert applied_controls(run.folder) == [("step", now.step)]


def test_a_changed_learning_rate_is_seen_in_the_next_step_and_in_the_record(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text, paused=True)
    run.step()
    run.wait_for(paused_at(1), PATIENCE)
    run.set(learning_rate=0.0123, balance_speed=0.25)
    run.step()
    now = run.wait_for(paused_at(2), PATIENCE)
    assert now.series["learning_rate"].values[1] == 0.0123
    assert now.series["balance_speed"].values[1] == 0.25
    assert set(now.changes) == {(2, "learning_rate", 0.0123), (2, "balance_speed", 0.25)}
    recorded = Tail(run.folder).snapshot()
    assert set(recorded.changes) == set(now.changes)
    assert recorded.series["learning_rate"].values[1] == 0.0123


def test_controls_of_a_foreign_process_work_alike(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text)
    run.wait_for(lambda now: now.step >= 1, PATIENCE)
    code = (
        "import sys; from workbench.record import Controls; c = Controls(sys.argv[1]); "
        "c.pause(); c.set(learning_rate=0.5); c.step(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run.folder)], check=True, timeout=PATIENCE)
    now = run.wait_for(lambda now: is_paused(now) and len(now.changes) == 1, PATIENCE)
    now = run.wait_for(paused_at(now.changes[0][0]), PATIENCE)
    assert now.series["learning_rate"].values[-1] == 0.5


def test_two_starts_leave_one_trainer(tmp_path, text):
    first = live.start(tiny(), tmp_path / "first", text=text)
    first.wait_for(lambda now: now.step >= 1, PATIENCE)
    second = live.start(tiny(), tmp_path / "second", text=text, paused=True)
    assert first.status == "stopped"
    assert first.snapshot().message == "another run was started"
    assert [t.name for t in threading.enumerate() if t.name.startswith("run ")] == ["run second"]
    assert checkpoint.latest(first.folder) == first.snapshot().step
    with pytest.raises(ValueError, match="first is stopped"):
        first.pause()
    again = live.resume(first.folder, text=text, paused=True)
    assert second.status == "stopped"
    assert again.wait_for(is_paused, PATIENCE).step == first.snapshot().step


def test_an_existing_folder_is_refused_and_the_run_goes_on(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text, paused=True)
    with pytest.raises(ValueError, match="'run' exists already"):
        live.start(tiny(), tmp_path / "run", text=text)
    assert run.wait_for(is_paused, PATIENCE).status == "paused"


def test_a_start_that_cannot_be_stops_no_run_and_makes_no_folder(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text, paused=True)
    narrow = tiny(model=replace(tiny().model, vocab_size=200))
    unreadable = tiny(text=Mixture({Files(str(tmp_path / "absent.txt")): 1.0}))
    nowhere = tiny(device=f"cuda:{torch.cuda.device_count()}")
    for recipe, given, said in (
        (narrow, text, "vocab_size=200 must be the tokenizer's 256"),
        (unreadable, None, "absent.txt"),
        (nowhere, text, "device='cuda:[0-9]+' is not on this machine"),
    ):
        with pytest.raises(ValueError, match=said):
            live.start(recipe, tmp_path / "other", text=given)
    assert not (tmp_path / "other").exists()
    assert run.wait_for(is_paused, PATIENCE).status == "paused"


def test_what_cannot_be_learned_from_is_refused_before_anything_is_made(tmp_path, text):
    with pytest.raises(ValueError, match=r"tiny needs about .* GB"):
        live.start(tiny(batch_size=2**30), tmp_path / "run", text=text)
    assert not (tmp_path / "run").exists()


def test_a_failing_trainer_says_so_once_and_wait_raises(tmp_path, text, capfd):
    run = live.start(tiny(), tmp_path / "run", text=text)
    run.set(learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="the update was not made") as failure:
        run.wait(PATIENCE)
    assert run.error is failure.value
    for now in (run.snapshot(), Tail(run.folder).snapshot()):
        assert now.status == "failed"
        assert now.message == f"FloatingPointError: {failure.value}"
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_takes_nothing_more_fails_the_run(tmp_path, text):
    run = live.start(tiny(checkpoint_every=3), tmp_path / "run", text=text, paused=True)
    run.wait_for(is_paused, PATIENCE)
    (run.folder / "checkpoints").rename(tmp_path / "elsewhere")
    (run.folder / "checkpoints").write_text("a file in the place of the folder")
    run.resume()
    with pytest.raises(OSError, match="checkpoints"):
        run.wait(PATIENCE)
    assert Tail(run.folder).snapshot().status == "failed"


def test_observers_are_told_once_and_do_not_hide_each_other(tmp_path, text):
    run = live.start(tiny(steps=2), tmp_path / "run", text=text, paused=True)
    told: list[tuple[str, str]] = []

    def fail() -> None:
        raise RuntimeError("a view that cannot draw")

    run.on_end(lambda: told.append(("first", run.status)))
    run.on_end(fail)
    run.on_end(lambda: told.append(("third", threading.current_thread().name)))
    run.resume()
    with pytest.warns(RuntimeWarning, match="run: an observer of its end failed: RuntimeError: a view that cannot"):
        assert run.wait(PATIENCE) == "finished"
    assert told == [("first", "finished"), ("third", "run run")]
    assert [str(error) for error in run.observer_errors] == ["a view that cannot draw"]
    assert "1 observers of its end failed" in repr(run)
    run.on_end(lambda: told.append(("late", threading.current_thread().name)))
    assert told[2:] == [("late", threading.current_thread().name)]


def test_an_observer_may_wait_for_its_run_and_start_the_next(tmp_path, text):
    first = live.start(tiny(steps=2), tmp_path / "first", text=text, paused=True)
    said: list[object] = []

    def go_on() -> None:
        said.append(first.wait())
        with pytest.raises(RuntimeError, match="ended before the awaited state came"):
            first.wait_for(lambda now: now.step == 3)
        said.append(live.start(tiny(steps=1), tmp_path / "second", text=text).wait(PATIENCE))

    first.on_end(go_on)
    first.resume()
    assert first.wait(PATIENCE) == "finished"
    assert (said, first.observer_errors) == (["finished", "finished"], ())


def test_an_observer_may_start_a_run_while_another_start_waits_for_the_end(tmp_path, text):
    first = live.start(tiny(), tmp_path / "first", text=text, paused=True)
    by_observer: list[live.Run] = []
    first.on_end(lambda: by_observer.append(live.start(tiny(), tmp_path / "second", text=text, paused=True)))
    by_us: list[live.Run] = []
    starting = threading.Thread(
        target=lambda: by_us.append(live.start(tiny(), tmp_path / "third", text=text, paused=True)), daemon=True
    )
    starting.start()
    starting.join(PATIENCE)
    assert by_us, "still waiting"
    first.wait(PATIENCE)
    assert sorted(run.status == "stopped" for run in (by_observer[0], by_us[0])) == [False, True]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell lets what runs in its background ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_wait_stops_the_run_with_a_checkpoint(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text)

    def interrupt() -> None:
        run.wait_for(lambda now: now.step >= 2, PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert (run.status, run.snapshot().message) == ("stopped", "interrupted")
    assert checkpoint.latest(run.folder) == run.snapshot().step >= 2


def test_waiting_has_a_limit(tmp_path, text):
    run = live.start(tiny(), tmp_path / "run", text=text, paused=True)
    assert run.wait_for(is_paused, PATIENCE).status == "paused"
    assert run.wait(0.0) == "paused"
    with pytest.raises(TimeoutError, match="did not come"):
        run.wait_for(lambda now: now.step == 1, 0.0)
    run.stop()
    with pytest.raises(RuntimeError, match="ended before the awaited state came"):
        run.wait_for(lambda now: now.step == 1, PATIENCE)


def test_control_of_a_run_that_has_ended_is_refused(tmp_path, text):
    run = live.start(tiny(steps=1), tmp_path / "run", text=text)
    run.wait(PATIENCE)
    for control in (run.pause, run.resume, run.step, run.stop, lambda: Controls(run.folder).stop()):
        with pytest.raises(ValueError, match="run is finished: nothing is left"):
            control()


def test_a_process_that_ends_stops_its_run_with_a_checkpoint(tmp_path, text):
    script = (
        "import sys; from workbench import live; from workbench.train.recipes import Recipe; "
        "run = live.start(Recipe.from_json(sys.argv[1]), sys.argv[2]); run.wait_for(lambda now: now.step >= 2)"
    )
    subprocess.run(
        [sys.executable, "-c", script, tiny().to_json(), str(tmp_path / "run")],
        check=True,
        timeout=PATIENCE,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    now = Tail(tmp_path / "run").snapshot()
    assert (now.status, now.message) == ("stopped", "its process ended")
    assert checkpoint.latest(tmp_path / "run") == now.step >= 2


def test_a_held_run_never_stands_between_the_events_of_one_update(tmp_path, text):
    run = live.start(tiny(steps=6, evaluate_every=2, checkpoint_every=3), tmp_path / "run", text=text, paused=True)
    evaluated = {0: [0], 1: [0], 2: [0, 2], 3: [0, 2], 4: [0, 2, 4], 5: [0, 2, 4]}
    for step in range(1, 6):
        run.step()
        now = run.wait_for(paused_at(step), PATIENCE)
        assert [evaluation.step for evaluation in now.evaluations] == evaluated[step]
        assert checkpoint.latest(run.folder) == step // 3 * 3
