"""Runs with made-up numbers, written by the real writer: what the tests of the views look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.record import RunWriter
from workbench.train.events import Evaluation, Spike, Step

LAYERS, EXPERTS = 4, 16
TOKEN_FLOORS = {"uniform": 5.545, "unigram": 3.9, "bigram": 2.9}
FLOORS = {"uniform": 5.545, "unigram": 3.312, "bigram": 2.447}


def layer_names(layers: int = LAYERS) -> tuple[str, ...]:
    return tuple(f"layer {index + 1}" for index in range(layers))


def load(step: int, *, layers: int = LAYERS, experts: int = EXPERTS) -> np.ndarray:
    """Loads that even out over the steps; one expert of the last layer is dead at first."""
    random = np.random.default_rng([7, step])
    unevenness = 1.5 * np.exp(-step / 60) + 0.15
    weights = np.exp(random.normal(0, unevenness, (layers, experts)))
    if step < 40 and layers:
        weights[-1, 3] = 0
    return np.round(4096 * weights / weights.sum(1, keepdims=True)).astype(np.int64)


def step_event(step: int, *, layers: int = LAYERS, experts: int = EXPERTS, corpus: str = "stdlib_code") -> Step:
    random = np.random.default_rng([11, step])
    loss = 1.7 + 3.8 * np.exp(-step / 70) + random.normal(0, 0.05) + (1.2 if step == 150 else 0)
    return Step(
        step=step,
        tokens_seen=4096 * step,
        epochs={corpus: step / 100},
        losses_nats={"next_token": loss, "mtp_1": loss + 0.6, "balance": 1.0 + 0.3 * np.exp(-step / 50), "z": 0.02},
        total_loss_nats=loss + 0.2,
        nats_per_byte=loss,
        learning_rate=3e-3 * min(1.0, step / 40) * (0.5 if step >= 180 else 1.0),
        balance_speed=1e-3,
        grad_norm=1.0,
        layer_names=layer_names(layers),
        load_LE=load(step, layers=layers, experts=experts),
        bias_LE=np.zeros((layers, experts), np.float32),
        step_ms=300.0,
    )


def evaluation(step: int, *, layers: int = LAYERS, experts: int = EXPERTS, corpus: str = "stdlib_code") -> Evaluation:
    loss = 1.8 + 3.75 * np.exp(-step / 70)
    return Evaluation(
        step=step,
        nats_per_token=loss,
        nats_per_byte=loss,
        nats_per_byte_by_corpus={corpus: loss - 0.1, "stdlib_prose": loss + 0.2},
        floors_nats_per_byte=FLOORS,
        floors_nats_per_token=TOKEN_FLOORS,
        mtp_accuracy={1: 0.31},
        distance_bigram_accuracy={1: 0.22},
        load_by_corpus_LE={corpus: load(step, layers=layers, experts=experts)},
        sample="def f(x):",
    )


def create(folder: Path, *, total_steps: int = 300, layers: int = LAYERS, experts: int = EXPERTS) -> RunWriter:
    return RunWriter.create(
        folder,
        recipe_json="{}",
        seed=0,
        total_steps=total_steps,
        text_fingerprint="0" * 64,
        layer_names=layer_names(layers),
        num_experts=experts,
        hardware={},
    )


def write_steps(
    writer: RunWriter,
    first: int,
    last: int,
    *,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    corpus: str = "stdlib_code",
) -> None:
    """Steps `first`..`last`, an evaluation every 50, a spike at step 150; committed at the end."""
    for step in range(first, last + 1):
        writer.write(step_event(step, layers=layers, experts=experts, corpus=corpus))
        if step == 150:
            writer.write(Spike(step=step, loss_nats=3.3, threshold_nats=2.4))
        if step % 50 == 0:
            writer.write(evaluation(step, layers=layers, experts=experts, corpus=corpus))
    writer.flush()
