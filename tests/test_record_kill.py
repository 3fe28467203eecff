"""Twenty real `kill -9` of a writing process, at seeded moments, at least five of them inside a checkpoint write.

Run as a script this file is the victim: a server that has imported torch once and forks a child for every trial, on
the same folder. The child does what a trainer does, with small numbers in place of a model, and says on its output what
it is about to do, so that the test can place its kills.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench import record
from workbench.record import checkpoint
from workbench.record.environment import environment
from workbench.record.git import GitState
from workbench.train.events import Checkpoint, Evaluation, Event, Spike, Step

KILLS, SAVE_EVERY = 20, 5
LAYERS, EXPERTS = ("layer_1", "layer_2", "layer_3"), 8


def events_of(step: int) -> Iterator[Event]:
    load_LE = np.random.default_rng(step).integers(0, 1000, (len(LAYERS), EXPERTS))
    yield Step(
        step=step,
        tokens_seen=step * 64,
        epochs={"code": step / 100},
        losses_nats={"next_token": 5 / step},
        total_loss_nats=6 / step,
        nats_per_byte=1 / 3 / step,
        learning_rate=1e-3,
        balance_speed=1e-3,
        grad_norm=float(step),
        layer_names=LAYERS,
        load_LE=load_LE,
        bias_LE=load_LE.astype(np.float32) / 7,
        step_ms=1.0,
    )
    if step % 7 == 0:
        yield Spike(step=step, loss_nats=9.0, threshold_nats=3.0)
    if step % 11 == 0:
        yield Evaluation(
            step=step,
            nats_per_token=2.0,
            nats_per_byte=1.0,
            nats_per_byte_by_corpus={"code": 1.0 / step},
            floors_nats_per_byte={"uniform": 8.0},
            floors_nats_per_token={"uniform": 8.0},
            mtp_accuracy={1: 0.5},
            distance_bigram_accuracy={1: 0.25},
            load_by_corpus_LE={"code": load_LE},
            sample=f"sample {step}",
        )


def state_of(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A few MB, so that writing them takes a good part of the time."""
    tensors = {f"layer_{i}": torch.full((256, 1024), 1000.0 * step + i) for i in range(6)}
    return tensors, {"step": step, "position": 1 / step}


def assert_is_state_of(step: int, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    expected_tensors, expected_values = state_of(step)
    assert values == expected_values
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert torch.equal(tensors[name], tensor), name


def open_writer(folder: Path) -> tuple[record.RunWriter, int]:
    if not folder.exists():
        writer = record.RunWriter.create(
            folder,
            recipe_json="{}",
            seed=1,
            total_steps=0,
            text_fingerprint="f",
            layer_names=LAYERS,
            num_experts=EXPERTS,
            hardware={},
        )
        return writer, 0
    if checkpoint.latest(folder) is None:
        return record.RunWriter.reopen(folder, 0), 0
    step, tensors, values = checkpoint.load(folder)
    assert_is_state_of(step, tensors, values)
    return record.RunWriter.reopen(folder, step), step


def work(folder: Path, last_step: int) -> None:
    say(f"pid {os.getpid()}")
    writer, step = open_writer(folder)
    writer.status("running")
    say(f"opened {step}")
    while step < last_step:
        step += 1
        for event in events_of(step):
            writer.write(event)
        say(f"step {step}")
        if step % SAVE_EVERY == 0:
            tensors, values = state_of(step)
            writer.write(Checkpoint(step=step, state=None))
            say(f"begin save {step}")
            checkpoint.save(folder, step, tensors, values)
            say(f"acknowledged {step}")
    writer.status("finished")
    writer.close()
    say("done")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def serve(folder: Path) -> None:
    """Fork a child for every line on the input, which holds its last step; tell when it is dead."""
    torch.set_num_threads(1)
    # What the children would otherwise each find out anew.
    environment(seed=0, text_fingerprint="", hardware={}, git=GitState(None, ""))
    say("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(folder, int(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say(f"dead {os.waitstatus_to_exitcode(status)}")


class Victim:
    """The server, its announcements line by line, and when each came."""

    def __init__(self, folder: Path) -> None:
        root = Path(record.__file__).parents[2]
        paths = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
        command = [sys.executable, __file__, str(folder)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=paths, bufsize=0)
        self._buffer = b""
        assert self.next_line() == "ready"

    def start(self, last_step: int) -> int:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{last_step}\n".encode())
        name, pid = self.next_line().split()
        assert name == "pid"
        return int(pid)

    def wait_for_output(self, seconds: float) -> None:
        """Until the victim says something more, or so long."""
        assert self._server.stdout is not None
        if b"\n" not in self._buffer:
            select.select([self._server.stdout], [], [], seconds)

    def next_line(self) -> str:
        assert self._server.stdout is not None
        while b"\n" not in self._buffer:
            chunk = os.read(self._server.stdout.fileno(), 65536)
            assert chunk, "the server ended"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def end(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.kill()
        self._server.wait()


def check_record(folder: Path, status: str) -> record.Snapshot:
    """Everything that is recorded is what was written, and nothing is missing in between."""
    tail = record.Tail(folder)
    snapshot = tail.snapshot()
    assert snapshot.status == status
    assert snapshot.load_step == snapshot.step
    steps = np.arange(1, snapshot.step + 1)
    if len(steps):
        np.testing.assert_array_equal(snapshot.series["next_token"].steps, steps)
        np.testing.assert_array_equal(snapshot.series["nats_per_byte"].values, 1 / 3 / steps)
        np.testing.assert_array_equal(snapshot.series["grad_norm"].values, steps)
    told = [event for step in steps for event in events_of(int(step))]
    assert snapshot.spikes == tuple(event for event in told if isinstance(event, Spike))
    assert [e.sample for e in snapshot.evaluations] == [e.sample for e in told if isinstance(e, Evaluation)]
    loads = {event.step: event.load_LE for event in told if isinstance(event, Step)}
    for step in {1, snapshot.step // 2, snapshot.step - 1, snapshot.step} & set(loads):
        np.testing.assert_array_equal(tail.load_at(step), loads[step])
    return snapshot


@pytest.mark.skipif(sys.platform == "win32", reason="there is neither fork nor kill -9")
def test_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(20)
    folder = tmp_path / "run"
    victim = Victim(folder)
    acknowledged: int | None = None
    kills_inside_a_save, save_s = 0, 0.02
    try:
        for trial in range(KILLS):
            pid = victim.start(10**6)
            # Three of five trials aim into a save, the others at any announcement, the opening included.
            aim_at_save = trial % 5 < 3
            awaited, last, begun_at = rng.randint(1, 2) if aim_at_save else rng.randint(0, 14), "", 0.0
            while awaited > 0:
                last = victim.next_line()
                if last.startswith("begin save"):
                    begun_at = time.perf_counter()
                elif last.startswith("acknowledged"):
                    acknowledged = int(last.split()[1])
                    save_s = time.perf_counter() - begun_at
                awaited -= last.startswith("begin save") or not aim_at_save
            victim.wait_for_output(rng.uniform(0, 0.8) * save_s)
            os.kill(pid, signal.SIGKILL)
            while not (line := victim.next_line()).startswith("dead"):
                last = line
                if line.startswith("acknowledged"):
                    acknowledged = int(line.split()[1])
            assert line == f"dead {-signal.SIGKILL}"

            inside = last.startswith("begin save")
            kills_inside_a_save += inside
            if not folder.exists():
                assert acknowledged is None
                continue
            newest = checkpoint.latest(folder)
            # A save that was not acknowledged may be there or not, but never half.
            assert newest in ({acknowledged, int(last.split()[2])} if inside else {acknowledged})
            snapshot = check_record(folder, "orphaned")
            if newest is not None:
                step, tensors, values = checkpoint.load(folder)
                assert_is_state_of(step, tensors, values)
                assert snapshot.step >= step
                # What has been loaded once must stay, whether or not its saver lived to say so.
                acknowledged = newest
        assert kills_inside_a_save >= 5

        last_step = (checkpoint.latest(folder) or 0) + 12
        victim.start(last_step)
        while (line := victim.next_line()) != "done":
            assert not line.startswith("dead"), line
        assert victim.next_line() == "dead 0"
    finally:
        victim.end()
    assert check_record(folder, "finished").step == last_step
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert len(list((folder / "arrays").iterdir())) == 1
    assert_equals_an_uninterrupted_run(folder, tmp_path / "whole", last_step)


def assert_equals_an_uninterrupted_run(folder: Path, whole: Path, last_step: int) -> None:
    writer, _ = open_writer(whole)
    for step in range(1, last_step + 1):
        for event in events_of(step):
            writer.write(event)
    writer.status("finished")
    writer.close()
    for table in ("scalars", "evaluations", "samples", "spikes", "segments"):
        assert rows(folder, table) == rows(whole, table)
    loads, expected = record.loads_between(folder), record.loads_between(whole)
    np.testing.assert_array_equal(loads.load_WLE, expected.load_WLE)
    np.testing.assert_array_equal(loads.bias_WLE, expected.bias_WLE)


def rows(folder: Path, table: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(folder / "run.sqlite")
    try:
        return connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
    finally:
        connection.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
