"""What a view reads of a run, whoever writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from workbench.train.events import Evaluation, Spike

LIVE_STATES = ("starting", "running", "paused")
ENDED_STATES = ("stopped", "finished", "failed")
ORPHANED = "orphaned"


@dataclass(frozen=True, eq=False)
class Series:
    """One scalar over the steps: int64 and float64 arrays of one length, read-only views of growing buffers."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A run at one moment; cheap to build, never changed afterwards.

    `version` grows whenever anything changed. `step` is the newest step. `status` is one of `LIVE_STATES`,
    `ENDED_STATES` or, when the process that wrote a live run is gone, `ORPHANED`. `load_LE` (int64) and `bias_LE`
    (float32) are those of `load_step`, which is 0 with zero arrays until the first load is there. `series` holds, in
    this order, the loss terms `next_token`, `mtp_1`.., `balance`, `z`, then `total`, `nats_per_byte`, `learning_rate`,
    `balance_speed`, `grad_norm`, `step_ms`, `tokens_seen` and `epochs/<corpus>`. `changes` are (step, name, value):
    what a control set, with the first step that used it.
    """

    version: int
    folder: Path
    name: str
    status: str
    message: str
    step: int
    total_steps: int
    series: Mapping[str, Series]
    layer_names: tuple[str, ...]
    load_step: int
    load_LE: np.ndarray
    bias_LE: np.ndarray
    evaluations: tuple[Evaluation, ...]
    spikes: tuple[Spike, ...]
    changes: tuple[tuple[int, str, float], ...]

    @property
    def ended(self) -> bool:
        """Whether nothing more will come from the process that wrote this."""
        return self.status not in LIVE_STATES


@runtime_checkable
class Source(Protocol):
    """Where snapshots come from: a run of this process, or a run folder."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        ...

    @property
    def live(self) -> bool:
        """True for a run of this process."""
        ...

    def snapshot(self) -> Snapshot:
        """The newest state."""
        ...

    def load_at(self, step: int) -> np.ndarray:
        """Loads [L, E] of a recorded step, int64.

        Raises:
            ValueError: no load of that step can be read; the line names the steps that can.
        """
        ...

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the run has ended; at once when it already has."""
        ...
