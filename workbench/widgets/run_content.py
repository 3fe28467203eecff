"""A run, live or recorded, as the content of a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from workbench.record import Controls, Snapshot, Source
from workbench.widgets.axes import number
from workbench.widgets.content import Content, Frame
from workbench.widgets.controls import Action, Control, Number, Slider, parse_number
from workbench.widgets.primitives import Primitive

STEP = "step"
SETTINGS = {"learning_rate": "Learning rate", "balance_speed": "Balance speed"}
ANSWERS = {
    "pause": "Pause: the run stands still after the step it is in.",
    "resume": "Resume: the run goes on.",
    "step": "Step: the run makes one step.",
    "stop": "Stop: the run saves a checkpoint and ends.",
}


class Replay:
    """Loads of a run by step; the last one read is kept, since a view asks for it again and again."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kept: tuple[int, np.ndarray] | None = None

    def load(self, snapshot: Snapshot, values: Mapping[str, Any]) -> tuple[int, np.ndarray]:
        """The step that the slider asks for, the newest when it stands at its right end, and its loads [L, E]."""
        step = values.get(STEP)
        if step is None:
            return snapshot.load_step, snapshot.load_LE
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"step={step!r} must be a whole number, or None for the newest")
        kept = self._kept
        if kept is None or kept[0] != step:
            kept = self._kept = (step, self._source.load_at(step))
        return kept


class RunContent(Content):
    """`build` makes the primitives from a snapshot and the values of the controls."""

    def __init__(
        self,
        kind: str,
        source: Source,
        build: Callable[[Snapshot, Mapping[str, Any]], list[Primitive]],
        *,
        replay: bool = False,
        steering: bool = False,
    ) -> None:
        self.key = f"{kind}:{source.folder}"
        self._kind = kind
        self._source = source
        self._build = build
        self._replay = replay
        self._settings = Controls(source.folder).settings() if steering else ()
        self._steering = steering

    def frame(self, values: Mapping[str, Any], have: int | None = None) -> Frame | None:
        snapshot = self._source.snapshot()
        if snapshot.version == have:
            return None
        return Frame(
            version=snapshot.version,
            title=f"{snapshot.name} · {self._kind}",
            status=status_line(snapshot),
            state=snapshot.status,
            ended=snapshot.ended,
            controls=self._controls(snapshot),
            primitives=tuple(self._build(snapshot, values)),
        )

    @property
    def ended(self) -> bool:
        return self._source.snapshot().ended

    @property
    def settles(self) -> bool:
        return True

    def on_end(self, callback: Callable[[], None]) -> None:
        self._source.on_end(callback)

    def act(self, action: str, given: Mapping[str, Any]) -> str:
        if not self._steering or action not in (*ANSWERS, "set"):
            raise ValueError(f"this view has no action {action!r}")
        controls = Controls(self._source.folder)
        if action == "set":
            # An empty field leaves its value as it is.
            numbers = {
                name: parse_number(label, given[name])
                for name, label in SETTINGS.items()
                if str(given.get(name, "")).strip()
            }
            if not numbers:
                names = " or a ".join(SETTINGS[name].lower() for name in self._settings)
                raise ValueError(f"Apply: type a {names} first")
            controls.set(**numbers)
            words = ", ".join(f"{SETTINGS[name].lower()} {number(value)}" for name, value in numbers.items())
            return f"From the next step on: {words}."
        {"pause": controls.pause, "resume": controls.resume, "step": controls.step, "stop": controls.stop}[action]()
        return ANSWERS[action]

    def _controls(self, snapshot: Snapshot) -> tuple[Control, ...]:
        found: list[Control] = []
        if self._steering:
            found += steering(snapshot, self._settings)
        if self._replay:
            found.append(
                Slider(name=STEP, label="Step shown", minimum=min(1, snapshot.load_step), maximum=snapshot.load_step)
            )
        return tuple(found)


def steering(snapshot: Snapshot, settings: tuple[str, ...]) -> list[Control]:
    """Buttons of a run, and fields for its `settings`, each saying why while it can do nothing."""
    running, paused = snapshot.status in ("starting", "running"), snapshot.status == "paused"
    why = f"The run is {snapshot.status}."

    def newest(name: str) -> str:
        series = snapshot.series.get(name)
        return number(float(series.values[-1])) if series is not None and len(series.values) else ""

    fields = tuple(Number(name=name, label=SETTINGS[name], value=newest(name)) for name in settings)
    return [
        Action(name="pause", label="Pause", enabled=running, why=why),
        Action(name="resume", label="Resume", enabled=paused, why=why),
        Action(name="step", label="Step", enabled=paused, why=f"{why} Pause it first." if running else why),
        Action(name="stop", label="Stop", enabled=running or paused, why=why),
        Action(name="set", label="Apply", enabled=running or paused, why=why, fields=fields),
    ]


def status_line(snapshot: Snapshot) -> str:
    """State, progress and newest losses in one line."""
    parts = [snapshot.status, f"step {snapshot.step} of {snapshot.total_steps}"]
    training = snapshot.series.get("nats_per_byte")
    if training is not None and len(training.values):
        parts.append(f"training {training.values[-1]:.3f} nats/byte")
    if snapshot.evaluations:
        newest = snapshot.evaluations[-1]
        parts.append(f"validation {newest.nats_per_byte:.3f} nats/byte (step {newest.step})")
    if snapshot.message:
        parts.append(snapshot.message)
    return " · ".join(parts)
