"""Where an update ends in the stream of events, so that a run can be held there."""

from __future__ import annotations

from workbench.train.events import Checkpoint, Evaluation, Event, Spike, Step
from workbench.train.recipes import Recipe


def last_event(recipe: Recipe, step: Step, spike_threshold: float) -> type[Event]:
    """The kind of the last event that `train` has for the update that `step` reports, itself included.

    `train` cannot be asked: it answers by making the next update. `spike_threshold` is that of the losses before it.
    """
    at_end = step.step == recipe.steps
    if at_end or step.step % recipe.checkpoint_every == 0:
        return Checkpoint
    if step.step % recipe.evaluate_every == 0:
        return Evaluation
    return Spike if step.losses_nats["next_token"] > spike_threshold else Step
