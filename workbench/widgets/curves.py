"""Losses over the steps of a run, against what counting alone achieves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.analysis import smooth
from workbench.record import Snapshot, Source, open_source
from workbench.widgets.axes import number
from workbench.widgets.base import View
from workbench.widgets.primitives import Line, Lines, Marker, Primitive, Reference, Table
from workbench.widgets.run_content import RunContent

SMOOTHED_STEPS = 10
REPEATS = "⚠ repeats: it may be memorised"
NOTHING_YET = "No step recorded yet."


def curves(run: Source | str | Path, live: bool | None = None) -> View:
    """Training and validation loss with the counting floors, the terms of the objective, and the learning rate.

    `run` is a run of this process or the path of a run folder, also of one that another process writes. For `live`
    see `View`.
    """
    return View(RunContent("curves", open_source(run), lambda snapshot, values: curve_primitives(snapshot)), live)


def curve_primitives(snapshot: Snapshot) -> list[Primitive]:
    """What `curves` shows of a snapshot."""
    return [_loss(snapshot), _terms(snapshot), _learning_rate(snapshot)]


def validation_table(snapshot: Snapshot) -> Table:
    """The newest evaluation: losses by corpus, floors, accuracy of further predictions, how often text was read.

    From one epoch on the training text repeats itself, and its loss falls by memory as well.
    """
    if not snapshot.evaluations:
        return Table(title="Validation", columns=("",), rows=(), summary="No evaluation recorded yet.")
    newest = snapshot.evaluations[-1]
    rows: list[tuple[str, str, str]] = [("all validation text", f"{newest.nats_per_byte:.3f} nats/byte", "")]
    for corpus, loss in newest.nats_per_byte_by_corpus.items():
        rows.append((corpus, f"{loss:.3f} nats/byte", ""))
    for name, floor in newest.floors_nats_per_byte.items():
        margin = floor - newest.nats_per_byte
        rows.append((f"{name} floor", f"{floor:.3f} nats/byte", f"model {abs(margin):.3f} {_side(margin)}"))
    for depth, accuracy in newest.mtp_accuracy.items():
        counted = newest.distance_bigram_accuracy.get(depth)
        peer = "" if counted is None else f"counting {counted:.1%}"
        rows.append((f"token {depth + 1} ahead (MTP {depth})", f"{accuracy:.1%} right", peer))
    epochs = newest_epochs(snapshot)
    for corpus, count in epochs.items():
        rows.append((f"{corpus}, training part", f"read {count:.2f} times", REPEATS if count >= 1 else ""))
    repeated = [corpus for corpus, count in epochs.items() if count >= 1]
    warning = f" Read more than once: {', '.join(repeated)}." if repeated else ""
    return Table(
        title=f"Validation at step {newest.step}",
        columns=("what", "value", "compared"),
        rows=tuple(rows),
        summary=f"{newest.nats_per_byte:.3f} nats/byte after {newest.step} steps.{warning}",
    )


def newest_epochs(snapshot: Snapshot) -> dict[str, float]:
    """How often the training part of each corpus has been read so far."""
    prefix = "epochs/"
    read = {name: series.values for name, series in snapshot.series.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): float(values[-1]) for name, values in read.items() if len(values)}


def _side(margin: float) -> str:
    return "below" if margin >= 0 else "above"


def _loss(snapshot: Snapshot) -> Lines:
    lines: list[Line] = []
    words: list[str] = []
    steps, values = _series(snapshot, "nats_per_byte")
    if len(steps):
        smoothed = smooth(values, SMOOTHED_STEPS)
        lines.append(Line(name="training, each step", x=steps, y=values, faint=True))
        lines.append(Line(name="training", label=f"training {smoothed[-1]:.2f}", x=steps, y=smoothed))
        words.append(f"training {smoothed[-1]:.3f} at step {steps[-1]}")
    references: tuple[Reference, ...] = ()
    if snapshot.evaluations:
        newest = snapshot.evaluations[-1]
        x = np.array([evaluation.step for evaluation in snapshot.evaluations])
        y = np.array([evaluation.nats_per_byte for evaluation in snapshot.evaluations])
        label = f"validation {newest.nats_per_byte:.2f}"
        lines.append(Line(name="validation", label=label, x=x, y=y, color=1, points=True))
        references = tuple(
            Reference(f"{name} {floor:.2f}", floor) for name, floor in newest.floors_nats_per_byte.items()
        )
        words.append(f"validation {newest.nats_per_byte:.3f} at step {newest.step}")
        words += [f"{name} floor {floor:.3f}" for name, floor in newest.floors_nats_per_byte.items()]
    if snapshot.spikes:
        words.append(f"{len(snapshot.spikes)} spikes, the last at step {snapshot.spikes[-1].step}")
    return Lines(
        title="Loss",
        x_label="step",
        y_label=f"nats/byte; training: mean of {SMOOTHED_STEPS} steps, each step faint",
        lines=tuple(lines),
        references=references,
        markers=(*_spikes(snapshot, steps, values), *_changes(snapshot)),
        summary=f"In nats/byte: {'; '.join(words)}." if words else NOTHING_YET,
    )


def _terms(snapshot: Snapshot) -> Lines:
    lines: list[Line] = []
    for name in snapshot.series:
        if not (name in ("next_token", "balance", "z", "indexer") or name.startswith("mtp_")):
            continue
        steps, values = _series(snapshot, name)
        # A term that is switched off is zero and has no place on a logarithmic axis.
        if len(steps) and (values > 0).any():
            label = name.replace("mtp_", "MTP ").replace("_", " ")
            lines.append(Line(name=label, x=steps, y=smooth(values, SMOOTHED_STEPS), color=len(lines)))
    words = ", ".join(f"{line.name} {number(float(line.y[-1]))}" for line in lines)
    floors = snapshot.evaluations[-1].floors_nats_per_token if snapshot.evaluations else {}
    references = tuple(Reference(f"{name} {floor:.2f}", floor) for name, floor in floors.items())
    return Lines(
        title="Terms of the objective, unweighted",
        x_label="step",
        y_label=f"nats/token (balance and z: no unit), mean of {SMOOTHED_STEPS} steps",
        y_scale="log10",
        lines=tuple(lines),
        references=references,
        summary=f"Newest: {words}." if words else NOTHING_YET,
        span=6,
    )


def _learning_rate(snapshot: Snapshot) -> Lines:
    steps, values = _series(snapshot, "learning_rate")
    return Lines(
        title="Learning rate",
        x_label="step",
        y_label="per update",
        lines=(Line(name="learning rate", label=number(float(values[-1])), x=steps, y=values),) if len(steps) else (),
        markers=tuple(m for m in _changes(snapshot) if m.label.startswith("learning rate")),
        summary=f"{number(float(values[-1]))} at step {steps[-1]}." if len(steps) else NOTHING_YET,
        span=6,
    )


def _series(snapshot: Snapshot, name: str) -> tuple[np.ndarray, np.ndarray]:
    series = snapshot.series.get(name)
    if series is None:
        return np.empty(0), np.empty(0)
    finite = np.isfinite(series.values)
    return series.steps[finite], series.values[finite]


def _spikes(snapshot: Snapshot, steps: np.ndarray, values: np.ndarray) -> tuple[Marker, ...]:
    """Spikes stand where the plotted loss stands; their own numbers are in nats per token."""
    found = []
    for spike in snapshot.spikes:
        height = values[steps == spike.step]
        label = f"spike: {spike.loss_nats:.3g} nats/token, above {spike.threshold_nats:.3g}"
        y = float(height[0]) if len(height) else float("nan")
        found.append(Marker(x=spike.step, label=label, kind="spike", y=y))
    return tuple(found)


def _changes(snapshot: Snapshot) -> tuple[Marker, ...]:
    return tuple(
        Marker(x=step, label=f"{name.replace('_', ' ')} → {number(value)}") for step, name, value in snapshot.changes
    )
