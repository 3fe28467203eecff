"""What a training run tells: plain frozen records that hold numpy, never tensors (but `Checkpoint.state`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer update.

    `losses_nats` holds every term of the objective unweighted: `next_token`, `mtp_1`.. (per token), `balance`, `z`.
    `load_LE` counts the tokens that each MoE layer (rows, named by `layer_names`) sent to each routed expert over the
    whole batch; `bias_LE` is the selection bias after the update. A model without experts has zero rows.
    `learning_rate` and `balance_speed` are the values that this update used.
    """

    step: int
    tokens_seen: int
    epochs: Mapping[str, float]
    losses_nats: Mapping[str, float]
    total_loss_nats: float
    nats_per_byte: float
    learning_rate: float
    balance_speed: float
    grad_norm: float
    layer_names: tuple[str, ...]
    load_LE: np.ndarray
    bias_LE: np.ndarray
    step_ms: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The model on the fixed validation batches, after `step` updates.

    `nats_per_byte` is the total next-token loss over the UTF-8 bytes of the predicted tokens; `floors_nats_per_byte`
    (`uniform`, `unigram`, `bigram`) are those of counting models over the very same tokens, and so per token.
    `mtp_accuracy` maps the prediction depth (1: the second token) to its accuracy; `distance_bigram_accuracy` gives,
    for the same depth, that of the best guess from the current token alone.
    `load_by_corpus_LE` counts the validation tokens of each corpus per MoE layer and expert.
    """

    step: int
    nats_per_token: float
    nats_per_byte: float
    nats_per_byte_by_corpus: Mapping[str, float]
    floors_nats_per_byte: Mapping[str, float]
    floors_nats_per_token: Mapping[str, float]
    mtp_accuracy: Mapping[int, float]
    distance_bigram_accuracy: Mapping[int, float]
    load_by_corpus_LE: Mapping[str, np.ndarray]
    sample: str


@dataclass(frozen=True, kw_only=True)
class Spike:
    """The next-token loss of `step` left its robust running band: above `threshold_nats` = median + k x scale."""

    step: int
    loss_nats: float
    threshold_nats: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment to save. `state` is a `TrainState`, valid until the next event is asked for."""

    step: int
    state: Any = field(repr=False)


Event = Step | Evaluation | Spike | Checkpoint


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a running trainer may be told between two steps; None leaves a value as it is.

    Raises:
        ValueError: a value is not a positive finite number (`balance_speed` may be zero), or nothing is changed.
    """

    learning_rate: float | None = None
    balance_speed: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.balance_speed is None:
            raise ValueError("a Change must set learning_rate or balance_speed")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be a positive finite number")
        if self.balance_speed is not None and not 0 <= self.balance_speed < float("inf"):
            raise ValueError(f"balance_speed={self.balance_speed} must be zero or a positive finite number")
