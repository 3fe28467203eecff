"""The recipe that the tour trains learns what it promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from workbench.analysis import dead_experts, max_violation_global
from workbench.train.events import Evaluation, Step
from workbench.train.loop import train
from workbench.train.recipes import toy_v3


def test_toy_v3_learns_what_counting_cannot() -> None:
    """Minutes of CPU: the whole recipe, on real text."""
    recipe = toy_v3()
    steps: list[Step] = []
    evaluations: list[Evaluation] = []
    for event in train(recipe):
        if isinstance(event, Step):
            steps.append(event)
        elif isinstance(event, Evaluation):
            evaluations.append(event)
    last = evaluations[-1]
    assert last.step == recipe.steps
    assert last.nats_per_byte < last.floors_nats_per_byte["bigram"] - 0.15
    assert last.mtp_accuracy[1] > last.distance_bigram_accuracy[1] + 0.05
    loads_WLE = np.stack([step.load_LE for step in steps[-50:]])
    assert not dead_experts(loads_WLE.sum(0)).any()
    assert max_violation_global(loads_WLE).max() < 1
    assert max(steps[-1].epochs.values()) < 1, "toy_v3 should not see a text twice"


def test_toy_v3_repeats_bitwise_at_its_thread_count() -> None:
    recipe = replace(toy_v3(), num_threads=2)
    runs = [train(recipe) for _ in range(2)]
    for _ in range(5):
        events = [next(run) for run in runs]
        first, second = events
        assert type(first) is type(second)
        if isinstance(first, Step) and isinstance(second, Step):
            assert (first.losses_nats, first.grad_norm) == (second.losses_nats, second.grad_norm)
            np.testing.assert_array_equal(first.load_LE, second.load_LE)
        if isinstance(first, Evaluation) and isinstance(second, Evaluation):
            assert (first.nats_per_token, first.sample) == (second.nats_per_token, second.sample)
