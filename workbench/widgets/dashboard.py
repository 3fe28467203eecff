"""Everything about a run in one place, with the controls to steer it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.record import Snapshot, Source, open_source
from workbench.widgets.base import View
from workbench.widgets.curves import curve_primitives, validation_table
from workbench.widgets.primitives import Primitive
from workbench.widgets.routing import routing_primitives
from workbench.widgets.run_content import Replay, RunContent


def dashboard(run: Source | str | Path, live: bool | None = None) -> View:
    """Losses, expert loads and the newest evaluation, with Pause, Resume, Step, Stop, learning rate and balance speed.

    The controls are rows in the run's folder: they steer a run of this process and one of another alike. `run` and
    `live` as in `routing`.
    """
    source = open_source(run)
    replay = Replay(source)

    def build(snapshot: Snapshot, values: Mapping[str, Any]) -> list[Primitive]:
        # The loads come next to the loss: what belongs together, and the most worth watching, fits on the first screen.
        loss, *others = curve_primitives(snapshot)
        loads = routing_primitives(snapshot, *replay.load(snapshot, values))
        return [loss, *loads, *others, validation_table(snapshot)]

    return View(RunContent("dashboard", source, build, replay=True, steering=True), live)
