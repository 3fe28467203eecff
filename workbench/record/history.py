"""What a run has told so far, in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from workbench.record.scalars import display_order, scalars_of
from workbench.record.snapshot import Series, Snapshot
from workbench.train.events import Evaluation, Spike, Step


class History:
    """Accumulates events and hands out snapshots that share its memory.

    One thread adds while others take snapshots. Buffers only grow, so an older snapshot stays as it was; a snapshot
    costs a view per series, and nothing at all when nothing changed.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, layer_names: tuple[str, ...], num_experts: int, version: int = 1
    ) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._layer_names = layer_names
        self._lock = threading.Lock()
        self._version = version
        self._state = ("starting", "")
        self._step = 0
        self._series: dict[str, _GrowingSeries] = {}
        shape = (len(layer_names), num_experts)
        self._load_step = 0
        self._load_LE = _read_only(np.zeros(shape, np.int64))
        self._bias_LE = _read_only(np.zeros(shape, np.float32))
        self._evaluations: tuple[Evaluation, ...] = ()
        self._spikes: tuple[Spike, ...] = ()
        self._changes: tuple[tuple[int, str, float], ...] = ()
        self._newest: Snapshot | None = None

    def add(self, event: Step | Evaluation | Spike) -> None:
        """Take in an event; its arrays are copied."""
        if isinstance(event, Step):
            step = np.array([event.step])
            self.add_series(event.step, {name: (step, [value]) for name, value in scalars_of(event).items()})
            self.set_load(event.step, event.load_LE, event.bias_LE)
        elif isinstance(event, Evaluation):
            loads = {corpus: _read_only(np.array(load, np.int64)) for corpus, load in event.load_by_corpus_LE.items()}
            self.add_evaluations((replace(event, load_by_corpus_LE=loads),))
        else:
            self.add_spikes((event,))

    def add_series(self, step: int, series: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
        """Append steps and values to each named series, up to the new newest `step`."""
        with self._lock:
            for name, (steps, values) in series.items():
                if name not in self._series:
                    self._series[name] = _GrowingSeries()
                self._series[name].extend(np.asarray(steps, np.int64), np.asarray(values, np.float64))
            self._step = step
            self._version += 1

    def set_load(self, step: int, load_LE: np.ndarray, bias_LE: np.ndarray) -> None:
        """Replace the newest loads and biases."""
        with self._lock:
            self._load_step = step
            self._load_LE = _read_only(np.array(load_LE, np.int64))
            self._bias_LE = _read_only(np.array(bias_LE, np.float32))
            self._version += 1

    def add_evaluations(self, evaluations: tuple[Evaluation, ...]) -> None:
        """Append evaluations."""
        with self._lock:
            self._evaluations += evaluations
            self._version += 1

    def add_spikes(self, spikes: tuple[Spike, ...]) -> None:
        """Append spikes."""
        with self._lock:
            self._spikes += spikes
            self._version += 1

    def add_change(self, step: int, name: str, value: float) -> None:
        """Append what a control set, with the first step that uses it."""
        with self._lock:
            self._changes += ((step, name, value),)
            self._version += 1

    def set_status(self, status: str, message: str = "") -> None:
        """Replace the status; the same one again changes nothing."""
        with self._lock:
            if self._state != (status, message):
                self._state = (status, message)
                self._version += 1

    def snapshot(self) -> Snapshot:
        """Everything so far; the same object as before when nothing changed."""
        with self._lock:
            if self._newest is None or self._newest.version != self._version:
                names = sorted(self._series, key=display_order)
                self._newest = Snapshot(
                    version=self._version,
                    folder=self._folder,
                    name=self._folder.name,
                    status=self._state[0],
                    message=self._state[1],
                    step=self._step,
                    total_steps=self._total_steps,
                    series=MappingProxyType({name: self._series[name].view() for name in names}),
                    layer_names=self._layer_names,
                    load_step=self._load_step,
                    load_LE=self._load_LE,
                    bias_LE=self._bias_LE,
                    evaluations=self._evaluations,
                    spikes=self._spikes,
                    changes=self._changes,
                )
            return self._newest


class _GrowingSeries:
    """Two arrays that at least double when full; views handed out earlier keep the old ones."""

    def __init__(self) -> None:
        self._steps = np.empty(256, np.int64)
        self._values = np.empty(256, np.float64)
        self._length = 0

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        end = self._length + len(steps)
        if end > len(self._steps):
            spare = max(end, 2 * len(self._steps)) - self._length
            self._steps = np.concatenate([self._steps[: self._length], np.empty(spare, np.int64)])
            self._values = np.concatenate([self._values[: self._length], np.empty(spare, np.float64)])
        self._steps[self._length : end] = steps
        self._values[self._length : end] = values
        self._length = end

    def view(self) -> Series:
        return Series(_read_only(self._steps[: self._length]), _read_only(self._values[: self._length]))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
