"""Resuming: to the bit in a fresh process, and refused when it could not be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_recipe

from workbench import live
from workbench.live.launch import stop_running
from workbench.record import RunWriter, Tail, checkpoint
from workbench.text import InductionTask, Mixture, ModularArithmeticTask, Text, load
from workbench.train.events import Change, Step
from workbench.train.loop import train
from workbench.train.recipes import AuxiliaryLoss, Recipe
from workbench.train.state import TrainState

PATIENCE = 120.0
SAVED, KILLED, TOTAL = 15, 18, 66


def recipe(**changes: object) -> Recipe:
    """With accumulation, MTP, experts and two corpora, of which each is read more than once in `TOTAL` steps."""
    small = Mixture({ModularArithmeticTask(num_documents=300): 1.0, InductionTask(num_documents=60): 1.0})
    ours = {"steps": TOTAL, "batch_size": 2, "accumulation_steps": 2, "text": small}
    quiet = {"evaluate_every": 30, "checkpoint_every": SAVED, "evaluation_batches": 1, "sample_tokens": 0}
    return tiny_recipe(**{**ours, **quiet, **changes})


def held_at(step: int):
    return lambda now: now.status == "paused" and now.step == step


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return load(recipe().text, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_left_running():
    threads = torch.get_num_threads()
    yield
    stop_running("the test is over", PATIENCE)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run whose process changed the learning rate after 5 and `SAVED` steps and was killed after `KILLED`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    script = f"""
import os, signal, sys
from workbench import live
from workbench.train.recipes import Recipe
run = live.start(Recipe.from_json(sys.argv[1]), sys.argv[2], paused=True)
for _ in range(5):
    run.step()
run.wait_for(lambda now: now.status == "paused" and now.step == 5)
run.set(learning_rate=0.002)
for _ in range({SAVED - 5}):
    run.step()
run.wait_for(lambda now: now.status == "paused" and now.step == {SAVED})
run.set(learning_rate=0.003)
for _ in range({KILLED - SAVED}):
    run.step()
run.wait_for(lambda now: now.status == "paused" and now.step == {KILLED})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, recipe().to_json(), str(folder)],
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")},
    )
    assert done.returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def orphan(killed, tmp_path) -> Path:
    """A copy of the killed run to spoil."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_a_killed_run_says_so(killed):
    now = Tail(killed).snapshot()
    assert (now.status, now.step) == ("orphaned", KILLED)
    assert checkpoint.latest(killed) == SAVED


def test_a_killed_run_goes_on_in_another_process_to_the_bit(orphan, tmp_path, text):
    resumed = live.resume(orphan, text=text)
    assert resumed.wait(PATIENCE) == "finished"

    whole = live.start(recipe(), tmp_path / "whole", text=text, paused=True)
    for _ in range(5):
        whole.step()
    whole.wait_for(held_at(5), PATIENCE)
    whole.set(learning_rate=0.002)
    for _ in range(SAVED - 5):
        whole.step()
    whole.wait_for(held_at(SAVED), PATIENCE)
    whole.set(learning_rate=0.003)
    whole.resume()
    assert whole.wait(PATIENCE) == "finished"

    ours, theirs = Tail(orphan).snapshot(), Tail(whole.folder).snapshot()
    epochs = [series.values for name, series in ours.series.items() if name.startswith("epochs/")]
    assert all(begun[SAVED - 1] % 1 > 0 and begun[-1] > 1 for begun in epochs), "in the middle of an epoch"
    assert ours.changes == theirs.changes == ((6, "learning_rate", 0.002), (SAVED + 1, "learning_rate", 0.003))
    assert ours.step - SAVED >= 50
    assert set(ours.series) == set(theirs.series)
    for name in set(ours.series) - {"step_ms"}:
        np.testing.assert_array_equal(ours.series[name].steps, np.arange(1, TOTAL + 1))
        np.testing.assert_array_equal(ours.series[name].values, theirs.series[name].values, err_msg=name)
    for step in (SAVED + 1, TOTAL):
        np.testing.assert_array_equal(Tail(orphan).load_at(step), Tail(whole.folder).load_at(step))
    assert [e.nats_per_token for e in ours.evaluations] == [e.nats_per_token for e in theirs.evaluations]
    for mine, other in zip(checkpoint.load(orphan)[1].values(), checkpoint.load(whole.folder)[1].values(), strict=True):
        assert torch.equal(mine, other)


def test_no_entry_of_the_saved_state_can_be_missing(killed):
    _, tensors, values = checkpoint.load(killed)
    TrainState.from_parts(recipe(), tensors, values)
    assert any(name.startswith("exp_avg_sq.") for name in tensors)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"lacks tensor '{name}'"):
            TrainState.from_parts(recipe(), rest, values)
    for name in values:
        rest = {other: value for other, value in values.items() if other != name}
        with pytest.raises(ValueError, match=f"lacks value '{name}'"):
            TrainState.from_parts(recipe(), tensors, rest)


def test_every_entry_of_the_saved_state_matters(killed, text):
    """Resetting any one to what a fresh state has changes the next losses, or is itself recorded."""
    _, tensors, values = checkpoint.load(killed)
    fresh_tensors, fresh_values = TrainState(recipe()).parts()

    def next_steps(tensors, values):
        events = train(recipe(), TrainState.from_parts(recipe(), tensors, values), text)
        steps = [event for event in (next(events), next(events)) if isinstance(event, Step)]
        assert len(steps) == 2
        return [(s.losses_nats, s.tokens_seen, s.balance_speed, s.learning_rate) for s in steps]

    expected = next_steps(tensors, values)
    assert next_steps(tensors, values) == expected
    for kind in ("parameter.", "buffer.", "exp_avg.", "exp_avg_sq."):
        reset = {
            name: fresh_tensors.get(name, torch.zeros_like(tensor)) if name.startswith(kind) else tensor
            for name, tensor in tensors.items()
        }
        assert next_steps(reset, values) != expected, kind
    for name in ("step", "tokens_seen", "learning_rate_anchor"):
        reset_values = {**values, name: 1 if name == "step" else fresh_values[name]}
        assert next_steps(tensors, reset_values) != expected, name
    assert next_steps(tensors, {**values, "balance_speed": 0.5}) != expected
    assert values["recent_losses"] == Tail(killed).snapshot().series["next_token"].values[:SAVED].tolist()


def test_a_change_given_with_resume_acts_on_the_first_step(orphan, text):
    run = live.resume(orphan, text=text, change=Change(learning_rate=0.01, balance_speed=0.125), paused=True)
    run.step()
    now = run.wait_for(held_at(SAVED + 1), PATIENCE)
    assert now.series["learning_rate"].values[SAVED] == 0.01
    assert now.series["balance_speed"].values[SAVED] == 0.125
    first = SAVED + 1
    assert set(now.changes[2:]) == {(first, "learning_rate", 0.01), (first, "balance_speed", 0.125)}


def test_what_was_recorded_after_the_checkpoint_is_dropped(orphan, text):
    run = live.resume(orphan, text=text, paused=True)
    run.wait_for(lambda now: now.status == "paused", PATIENCE)
    assert run.snapshot().step == Tail(orphan).snapshot().step == SAVED


def test_a_finished_run_needs_more_steps_and_takes_them(tmp_path, text):
    live.start(recipe(steps=3), tmp_path / "run", text=text).wait(PATIENCE)
    with pytest.raises(ValueError, match="run has made 3 of 3 steps; pass a larger `steps`"):
        live.resume(tmp_path / "run", text=text)
    longer = live.resume(tmp_path / "run", text=text, steps=5, paused=True)
    longer.wait_for(lambda now: now.status == "paused", PATIENCE)
    again = live.resume(tmp_path / "run", text=text)
    assert again.wait(PATIENCE) == "finished"
    now = Tail(tmp_path / "run").snapshot()
    assert (now.step, now.total_steps) == (5, 5)
    np.testing.assert_array_equal(now.series["total"].steps, [1, 2, 3, 4, 5])


def test_a_run_that_failed_at_once_begins_again_from_step_0_and_can_be_told_otherwise(tmp_path, text):
    run = live.start(recipe(), tmp_path / "run", text=text, paused=True)
    run.set(learning_rate=1e38)
    run.resume()
    with pytest.raises(FloatingPointError):
        run.wait(PATIENCE)
    again = live.resume(run.folder, text=text, change=Change(learning_rate=0.001), paused=True)
    again.step()
    now = again.wait_for(held_at(1), PATIENCE)
    assert [evaluation.step for evaluation in now.evaluations] == [0]
    assert now.changes == ((1, "learning_rate", 1e38), (1, "learning_rate", 0.001))
    assert now.series["learning_rate"].values.tolist() == [0.001]


def short(**changes: object) -> Recipe:
    """Evaluations and checkpoints at steps of their own and at common ones."""
    return recipe(**{"steps": 7, "accumulation_steps": 1, "evaluate_every": 2, "checkpoint_every": 3, **changes})


def require_equal_records(one: Path, other: Path) -> None:
    """All that was recorded, but times; and the newest checkpoint, to the bit."""
    ours, theirs = Tail(one).snapshot(), Tail(other).snapshot()
    assert (ours.step, ours.status) == (theirs.step, theirs.status)
    assert (ours.changes, ours.spikes) == (theirs.changes, theirs.spikes)
    assert set(ours.series) == set(theirs.series)
    for name in set(ours.series) - {"step_ms"}:
        np.testing.assert_array_equal(ours.series[name].steps, theirs.series[name].steps)
        np.testing.assert_array_equal(ours.series[name].values, theirs.series[name].values, err_msg=name)
    scores = [[(e.step, e.nats_per_token) for e in now.evaluations] for now in (ours, theirs)]
    assert scores[0] == scores[1]
    (step, tensors, values), (other_step, other_tensors, other_values) = checkpoint.load(one), checkpoint.load(other)
    assert (step, values) == (other_step, other_values)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


def test_a_run_stopped_after_every_step_equals_one_that_never_was(tmp_path, text):
    whole = live.start(short(), tmp_path / "whole", text=text)
    assert whole.wait(PATIENCE) == "finished"
    assert [evaluation.step for evaluation in whole.snapshot().evaluations] == [0, 2, 4, 6, 7]
    run = live.start(short(), tmp_path / "run", text=text, paused=True)
    for step in range(1, 7):
        run.step()
        run.wait_for(held_at(step), PATIENCE)
        run.stop()
        assert run.wait(PATIENCE) == "stopped"
        run = live.resume(run.folder, text=text, paused=True)
    run.resume()
    assert run.wait(PATIENCE) == "finished"
    require_equal_records(run.folder, whole.folder)


def test_a_spike_is_not_lost_when_the_run_stops_at_its_step(tmp_path, text):
    spiky = short(steps=45, evaluate_every=45, checkpoint_every=45)

    def spoil(folder: Path) -> live.Run:
        run = live.start(spiky, folder, text=text, paused=True)
        for _ in range(30):
            run.step()
        run.wait_for(held_at(30), PATIENCE)
        run.set(learning_rate=1.0)
        return run

    whole = spoil(tmp_path / "whole")
    whole.resume()
    assert whole.wait(PATIENCE) == "finished"
    spike = whole.snapshot().spikes[0].step
    run = spoil(tmp_path / "run")
    for _ in range(30, spike):
        run.step()
    run.wait_for(held_at(spike), PATIENCE)
    run.stop()
    run.wait(PATIENCE)
    assert live.resume(run.folder, text=text).wait(PATIENCE) == "finished"
    require_equal_records(run.folder, whole.folder)


@pytest.mark.parametrize("at", [0, 3, 4], ids=["at the start", "at a checkpoint", "between checkpoints"])
def test_what_was_set_before_a_stop_acts_after_it(tmp_path, text, at):
    def held(folder: Path) -> live.Run:
        run = live.start(short(), folder, text=text, paused=True)
        for _ in range(at):
            run.step()
        run.wait_for(held_at(at), PATIENCE)
        run.set(learning_rate=0.5)
        run.set(learning_rate=1e-6, balance_speed=0.125)
        run.wait_for(lambda now: len(now.changes) == 3, PATIENCE)
        return run

    run = held(tmp_path / "run")
    run.stop()
    run.wait(PATIENCE)
    # Once more, without a step in between.
    run = live.resume(run.folder, text=text, paused=True)
    run.stop()
    run.wait(PATIENCE)
    assert live.resume(run.folder, text=text).wait(PATIENCE) == "finished"
    whole = held(tmp_path / "whole")
    whole.resume()
    assert whole.wait(PATIENCE) == "finished"
    assert whole.snapshot().series["learning_rate"].values[at] == 1e-6
    require_equal_records(run.folder, whole.folder)


def test_a_change_given_with_resume_survives_a_stop_before_the_first_step(orphan, text):
    run = live.resume(orphan, text=text, change=Change(learning_rate=0.01), paused=True)
    run.stop()
    run.wait(PATIENCE)
    again = live.resume(orphan, text=text, paused=True)
    again.step()
    now = again.wait_for(held_at(SAVED + 1), PATIENCE)
    assert now.changes[1:] == ((SAVED + 1, "learning_rate", 0.003), (SAVED + 1, "learning_rate", 0.01))
    assert now.series["learning_rate"].values[SAVED] == 0.01


def test_the_decoder_of_a_run_is_that_of_its_newest_checkpoint(killed):
    _, tensors, values = checkpoint.load(killed)
    tokens = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        expected = TrainState.from_parts(recipe(), tensors, values).decoder(tokens).logits
        assert torch.equal(live.decoder(killed)(tokens).logits, expected)
        assert not torch.equal(live.decoder(killed, step=0)(tokens).logits, expected)
    _, kept, _ = checkpoint.load(killed, prefixes=("parameter.", "buffer."))
    assert kept.keys() == {name for name in tensors if not name.startswith("exp_avg")} != tensors.keys()


def test_a_run_that_trains_elsewhere_is_refused(orphan, text):
    holder = (
        "import sys; from workbench.record import RunWriter; w = RunWriter.reopen(sys.argv[1], 15); "
        "w.status('running'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(orphan)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="run is running, written by another trainer; stop that first"):
            live.resume(orphan, text=text)
        process.stdin.close()
        process.wait(PATIENCE)


def test_a_changed_text_is_refused_with_what_differs(orphan, text):
    other = load(Mixture({ModularArithmeticTask(num_documents=299): 1.0, InductionTask(num_documents=60): 1.0}))
    with pytest.raises(ValueError, match=f"run was trained on the text {text.fingerprint[:12]} and .* now read as"):
        live.resume(orphan, text=other)
    assert Tail(orphan).snapshot().step == KILLED, "nothing was dropped"


def test_a_changed_recipe_is_refused_before_anything_is_dropped(orphan, text):
    wider = replace(recipe(), model=replace(recipe().model, hidden_size=64))
    (orphan / "recipe.json").write_text(wider.to_json())
    with pytest.raises(ValueError, match=r"saved tensor .* this recipe needs"):
        live.resume(orphan, text=text)
    assert Tail(orphan).snapshot().step == KILLED


def test_a_damaged_checkpoint_is_refused_before_anything_is_dropped(orphan, text):
    saved = next((orphan / "checkpoints").glob(f"*{SAVED}")) / "state.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"balance_speed": 0.0}))
    with pytest.raises(ValueError, match=r"is damaged: state\.json"):
        live.resume(orphan, text=text)
    assert Tail(orphan).snapshot().step == KILLED
    run = live.resume(orphan, step=0, text=text, paused=True)
    assert run.wait_for(lambda now: now.status == "paused", PATIENCE).step == 0
    assert checkpoint.latest(orphan) == 0


def test_a_resume_that_cannot_be_stops_no_run(orphan, tmp_path, text):
    run = live.start(recipe(), tmp_path / "other", text=text, paused=True)
    with pytest.raises(ValueError, match="there is no checkpoint of step 7"):
        live.resume(orphan, text=text, step=7)
    with pytest.raises(ValueError, match="pass a larger `steps`"):
        live.resume(orphan, text=text, steps=3)
    with pytest.raises(ValueError, match="is not a run folder"):
        live.resume(tmp_path / "nothing", text=text)
    assert run.wait_for(lambda now: now.status == "paused", PATIENCE).step == 0


def test_a_change_that_does_nothing_in_this_run_is_refused_before_anything_is_dropped(tmp_path, text):
    run = live.start(short(balance=AuxiliaryLoss()), tmp_path / "run", text=text, paused=True)
    run.step()
    run.wait_for(held_at(1), PATIENCE)
    with pytest.raises(ValueError, match="it has no balance_speed to set"):
        run.set(balance_speed=0.1)
    run.stop()
    run.wait(PATIENCE)
    with pytest.raises(ValueError, match="balance_speed has no effect in this run"):
        live.resume(run.folder, text=text, change=Change(balance_speed=0.1), step=0)
    assert Tail(run.folder).snapshot().step == 1


def test_what_is_no_run_folder_or_has_no_checkpoint_is_refused(orphan, tmp_path, text):
    with pytest.raises(ValueError, match="is not a run folder"):
        live.resume(tmp_path / "nothing", text=text)
    with pytest.raises(ValueError, match="is not a run folder"):
        live.decoder(tmp_path / "nothing")
    shutil.rmtree(orphan / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        live.resume(orphan, text=text)


def test_a_writer_of_this_process_keeps_a_resume_out(orphan, text):
    with (
        RunWriter.reopen(orphan, SAVED),
        pytest.raises(ValueError, match="run is starting, written by another trainer"),
    ):
        live.resume(orphan, text=text)
