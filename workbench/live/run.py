"""A training run on a thread of its own: it records, publishes snapshots and follows controls."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from time import monotonic
from typing import Any

from workbench.live.mailbox import Mailbox
from workbench.live.observers import Observers
from workbench.live.pace import Pace
from workbench.record import Controls, RunWriter, Snapshot, checkpoint
from workbench.text import Text
from workbench.train.events import Checkpoint, Evaluation, Event, Step
from workbench.train.loop import apply_change, due_after, train
from workbench.train.recipes import Recipe
from workbench.train.spikes import SpikeDetector
from workbench.train.state import TrainState

# How often a paused run looks for the controls of other processes; those of this process wake it at once.
_POLL_SECONDS = 0.05
# Waits come in slices: some systems deliver an interrupt only between two of them.
_SLICE_SECONDS = 0.5


class Run:
    """A run of this process, made by `start` or `resume`; a `Source` for every view.

    Controls are rows of the run folder, whoever sends them, and take effect between two steps. The thread writes the
    record and nothing else: it prints nothing and touches no widget. Every method may be called from any thread.
    """

    live = True

    def __init__(
        self, writer: RunWriter, recipe: Recipe, text: Text, state: TrainState | None, *, paused: bool = False
    ) -> None:
        """Begin at once; `state` None is a fresh one. Only for `start` and `resume`, which keep it the only one."""
        self._writer = writer
        self._recipe = recipe
        self._text = text
        self._pace = Pace(paused=paused)
        self._controls = Controls(writer.folder)
        self._mailbox = Mailbox(writer.folder)
        self._began_with = writer.history.snapshot()
        self._halted: str | None = None
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._observers = Observers()
        self._error: BaseException | None = None
        # First the record is closed, then the observers are told: they may start the next run or wait for this one.
        self._closed = threading.Event()
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(state,), name=f"run {self.folder.name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        now = self.snapshot()
        failed = f", {len(self.observer_errors)} observers of its end failed" if self.observer_errors else ""
        return f"<Run {now.name}: {now.status}, step {now.step} of {now.total_steps}{failed}>"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._writer.folder

    @property
    def text(self) -> Text:
        """What it trains on."""
        return self._text

    @property
    def status(self) -> str:
        """`starting`, `running`, `paused`, `stopped`, `finished` or `failed`."""
        return self.snapshot().status

    @property
    def error(self) -> BaseException | None:
        """What ended a failed run."""
        return self._error

    @property
    def observer_errors(self) -> tuple[BaseException, ...]:
        """What observers of the end raised: the run and the other observers did not notice, `wait` warns of it."""
        return self._observers.errors

    @property
    def began_with(self) -> Snapshot:
        """What was recorded when it began: for a resumed run, everything up to its checkpoint."""
        return self._began_with

    def snapshot(self) -> Snapshot:
        """Everything so far, from memory."""
        return self._writer.history.snapshot()

    def load_at(self, step: int):
        """Loads [L, E] of a step of this run, an int64 array.

        Raises:
            ValueError: that step has not been made, or its file is lost.
        """
        return self._writer.load_at(step)

    def pause(self) -> None:
        """Wait after the step that is being made.

        Raises:
            ValueError: the run has ended (so for every control).
        """
        self._controls.pause()
        self._wake.set()

    def resume(self) -> None:
        """Go on after a pause."""
        self._controls.resume()
        self._wake.set()

    def step(self) -> None:
        """Make one step, then wait."""
        self._controls.step()
        self._wake.set()

    def stop(self) -> None:
        """Save a checkpoint and end; `wait` for it. `resume(folder)` continues exactly."""
        self._controls.stop()
        self._wake.set()

    def set(self, *, learning_rate: float | None = None, balance_speed: float | None = None) -> None:
        """Use other values from the next step on; None leaves a value as it is.

        Raises:
            ValueError: a value is out of range, or nothing is set.
        """
        self._controls.set(learning_rate=learning_rate, balance_speed=balance_speed)
        self._wake.set()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the run has ended, on the run's thread; at once when it already has."""
        self._observers.add(callback)

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the end and its observers, at most `timeout` seconds; returns the status.

        A paused run does not end by itself. An observer of the end that failed is a warning, not an error of the run.
        An interrupt (Ctrl-C, the notebook's stop button) stops the run with a checkpoint before it goes on upwards, so
        that nothing trains unseen; `resume(folder)` continues it. A second interrupt does not wait for that.

        Raises:
            BaseException: whatever ended the run, if it failed.
        """
        try:
            # An observer that waits must not wait for itself.
            ended = _await(self._closed if threading.current_thread() is self._thread else self._told, timeout)
        except KeyboardInterrupt:
            self.halt("interrupted")
            raise
        for error in self.observer_errors:
            told = f"{self.folder.name}: an observer of its end failed: {type(error).__name__}: {error}"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        if ended and self._error is not None:
            raise self._error
        return self.status

    def __await__(self) -> Generator[Any, None, str]:
        """`await run` in a notebook: like `wait`, while views and their controls go on working."""
        try:
            yield from self._ended_soon().__await__()
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.halt("interrupted")
            raise
        return self.wait()

    async def _ended_soon(self) -> None:
        while not self._told.is_set():
            await asyncio.sleep(_POLL_SECONDS)

    def wait_for(self, condition: Callable[[Snapshot], bool], timeout: float | None = None) -> Snapshot:
        """A snapshot of which `condition` holds, as soon as there is one.

        Raises:
            TimeoutError: `timeout` seconds have passed before.
            RuntimeError: the run has ended before; its error, if it failed, is the cause.
        """
        seen = self.snapshot()

        def met() -> bool:
            nonlocal seen
            seen = self.snapshot()
            return condition(seen)

        with self._news:
            if not self._news.wait_for(lambda: met() or self._closed.is_set(), timeout):
                raise TimeoutError(f"{self!r}: the awaited state did not come within {timeout} s")
        if not condition(seen):
            raise RuntimeError(f"{self!r} ended before the awaited state came") from self._error
        return seen

    def halt(self, reason: str, timeout: float | None = None) -> bool:
        """Stop with a checkpoint for a reason other than a control, and wait for it; whether it has ended in time.

        It needs no row in the database, so that it works when the disk is full. Nothing happens when the run has ended.
        Observers are not waited for: one of them may be what stops the run, to start another.
        """
        self._halted = reason
        self._wake.set()
        return _await(self._closed, timeout)

    def _live(self, state: TrainState | None) -> None:
        """The thread: train, close the record, tell the observers."""
        # A thread has nobody above it to raise to: here, and only here, everything is caught, to be raised by `wait`.
        try:
            self._tell(*self._train(state))
        except BaseException as error:  # noqa: BLE001
            self._fail(error)
        self._mailbox.close()
        try:
            self._writer.close()
        except BaseException as error:  # noqa: BLE001
            self._fail(error)
        self._closed.set()
        self._publish()
        self._observers.tell()
        self._told.set()

    def _train(self, state: TrainState | None) -> tuple[str, str]:
        """Make steps until nothing is left or somebody stops it; returns the final status and message."""
        state = TrainState(self._recipe) if state is None else state
        # A run that is killed before its first checkpoint falls due can be resumed, too.
        self._save(state)
        events = train(self._recipe, state, self._text)
        while state.step < self._recipe.steps:
            if not self._may_go_on(state):
                self._save(state)
                return "stopped", self._halted or ""
            self._make_step(events, state)
        return "finished", ""

    def _make_step(self, events: Generator[Event, Any], state: TrainState) -> None:
        """Take every event of one update, so that a run never stands between two of them; or the evaluation of step 0.

        A run that was left in between would go on without the rest.
        """
        spike_threshold = SpikeDetector(state.recent_losses).threshold()
        event = next(events)
        self._take(event)
        if isinstance(event, Step):
            for _ in due_after(self._recipe, event, spike_threshold):
                self._take(next(events))

    def _may_go_on(self, state: TrainState) -> bool:
        """Follow the controls, waiting while they say so; False when they end the run."""
        while True:
            self._wake.clear()
            for control in self._mailbox.pending():
                if control.change is not None:
                    # Not by `send`, which a generator takes only once it has begun.
                    apply_change(control.change, state)
                self._pace.take(control.kind)
                self._writer.applied(control.id, state.step + 1)
                self._publish()
            if self._pace.stopped or self._halted is not None:
                return False
            if not self._pace.held:
                self._tell("running")
                return True
            self._tell("paused")
            self._wake.wait(_POLL_SECONDS)

    def _take(self, event: Event) -> None:
        """Record one event and publish it."""
        if isinstance(event, Evaluation) and event.step in (known.step for known in self._began_with.evaluations):
            return  # A run resumed at step 0 begins with the evaluation that it has already recorded.
        self._writer.write(event)
        if isinstance(event, Checkpoint):
            self._save(event.state)
        elif isinstance(event, Step):
            self._pace.made_step()
        self._publish()

    def _save(self, state: TrainState) -> None:
        """Make sure that the newest checkpoint is of this moment."""
        if checkpoint.latest(self.folder) != state.step:
            # The record must never be behind its checkpoints.
            self._writer.flush()
            checkpoint.save(self.folder, state.step, *state.parts())

    def _tell(self, status: str, message: str = "") -> None:
        """Record and publish the status if it is another."""
        now = self.snapshot()
        if (now.status, now.message) != (status, message):
            self._writer.status(status, message)
            self._publish()

    def _publish(self) -> None:
        """Wake those who wait for a snapshot."""
        with self._news:
            self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Keep the first error and say so in memory, and on the disk if that still works."""
        if self._error is not None:
            self._error.add_note(f"then, while the run was being closed: {error}")
            return
        self._error = error
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        self._writer.history.set_status("failed", line)
        try:
            self._writer.status("failed", line)
        except BaseException as second:  # noqa: BLE001
            error.add_note(f"then, while the run was being closed: {second}")


def _await(event: threading.Event, timeout: float | None) -> bool:
    """Whether `event` comes within `timeout` seconds."""
    until = float("inf") if timeout is None else monotonic() + timeout
    while not event.is_set() and (left := until - monotonic()) > 0:
        event.wait(min(_SLICE_SECONDS, left))
    return event.is_set()
