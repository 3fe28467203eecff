"""Figures of a run folder agree with those of the events that were written into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from workbench.analysis import balance_history, max_violation, normalized_entropy
from workbench.record import RunWriter
from workbench.train.events import Step

LAYERS = ("layer 1", "mtp 1")
LOADS = np.random.default_rng(0).integers(0, 9, size=(7, 2, 4)) + np.eye(2, 4, dtype=np.int64)
LOADS[2, 0] = [0, 30, 0, 0]


def step(number: int, load_LE: np.ndarray) -> Step:
    return Step(
        step=number,
        tokens_seen=number,
        epochs={},
        losses_nats={"next_token": 1.0},
        total_loss_nats=1.0,
        nats_per_byte=1.0,
        learning_rate=0.1,
        balance_speed=0.0,
        grad_norm=1.0,
        layer_names=LAYERS,
        load_LE=load_LE.astype(np.int32),
        bias_LE=np.zeros(load_LE.shape, np.float32),
        step_ms=1.0,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    with RunWriter.create(
        tmp_path / "run",
        recipe_json="{}",
        seed=0,
        total_steps=len(LOADS),
        text_fingerprint="",
        layer_names=LAYERS,
        num_experts=4,
        hardware={},
    ) as writer:
        for number, load_LE in enumerate(LOADS, start=1):
            writer.write(step(number, load_LE))
    return tmp_path / "run"


def test_every_step_and_layer_has_its_figures(folder):
    frame = balance_history(folder)
    assert list(frame["step"]) == [number for number in range(1, 8) for _ in LAYERS]
    assert list(frame["layer"]) == list(LAYERS) * 7
    np.testing.assert_allclose(frame["max_violation"], max_violation(LOADS).ravel())
    np.testing.assert_allclose(frame["normalized_entropy"], normalized_entropy(LOADS).ravel())
    third = frame[(frame["step"] == 3) & (frame["layer"] == "layer 1")].iloc[0]
    assert (third["max_violation"], third["dead_experts"]) == (3.0, 3)


def test_part_of_the_steps(folder):
    assert sorted(set(balance_history(folder, first=2, last=6, every=2)["step"])) == [2, 4, 6]
    assert len(balance_history(folder, first=100)) == 0


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        balance_history(tmp_path)
