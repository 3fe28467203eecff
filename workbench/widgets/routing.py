"""Which experts get the tokens, layer by layer, at any recorded step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.analysis import dead_experts, load_fractions, max_violation
from workbench.record import Snapshot, Source, open_source
from workbench.widgets.base import View
from workbench.widgets.primitives import Bars, Heatmap, Primitive
from workbench.widgets.run_content import Replay, RunContent

# Loads above twice the mean share one colour, at every step and in every run; tooltips and tables have the numbers.
HIGHEST_COLOR = 2.0
Z_TICKS = ((0.0, "0"), (1.0, "1 balanced"), (2.0, "≥ 2"))


def routing(run: Source | str | Path, live: bool | None = None) -> View:
    """Load of every expert relative to its layer's mean, MaxVio and dead experts, with a slider over the steps.

    `run` is a run of this process or the path of a run folder, also of one that another process writes. For `live`
    see `View`; `live=True` replays a run that has ended. `view.bundle(step=57)` is the static form at a step.
    """
    source = open_source(run)
    replay = Replay(source)
    return View(
        RunContent(
            "routing",
            source,
            lambda snapshot, values: routing_primitives(snapshot, *replay.load(snapshot, values)),
            replay=True,
        ),
        live,
    )


def routing_primitives(snapshot: Snapshot, step: int, load_LE: np.ndarray) -> list[Primitive]:
    """What `routing` shows of the loads of a step."""
    names = snapshot.layer_names
    if step == 0 or load_LE.size == 0:
        load_LE, names = np.zeros((0, 0)), ()
    layers, experts = load_LE.shape
    relative_LE = np.nan_to_num(load_fractions(load_LE) * experts)
    violation_L = np.nan_to_num(max_violation(load_LE)) if layers else np.zeros(0)
    dead_LE = dead_experts(load_LE)
    return [
        Heatmap(
            title=f"Expert load at step {step}" if layers else "Expert load",
            x_label="routed expert",
            y_label="layer",
            z_label="× the layer's mean",
            values_PQ=relative_LE,
            row_names=names,
            column_name="expert",
            low=0.0,
            high=HIGHEST_COLOR,
            z_ticks=Z_TICKS,
            detail_PQ=load_LE,
            detail_label="tokens",
            marked_PQ=dead_LE,
            mark_label="dead: below 1 % of the mean",
            summary=_summary(names, step, violation_L, dead_LE) if layers else _nothing(snapshot),
        ),
        Bars(
            title="Imbalance (MaxVio) and dead experts",
            x_label="(largest load − mean) / mean",
            y_label="layer",
            names=names,
            values=violation_L,
            notes=tuple(f"{count} dead" if count else "" for count in dead_LE.sum(1)),
            summary=f"MaxVio {violation_L.max():.3g} at most; 0 is balance." if layers else _nothing(snapshot),
        ),
    ]


def _nothing(snapshot: Snapshot) -> str:
    return "No step recorded yet." if snapshot.layer_names else "This model routes nothing: it has no experts."


def _summary(names: tuple[str, ...], step: int, violation_L: np.ndarray, dead_LE: np.ndarray) -> str:
    worst = int(violation_L.argmax())
    return (
        f"Step {step}, {len(names)} layers of {dead_LE.shape[1]} experts: the busiest, in {names[worst]}, takes "
        f"{1 + violation_L[worst]:.3g} times the mean; {int(dead_LE.sum())} of {dead_LE.size} experts are dead."
    )
