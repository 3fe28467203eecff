"""An `Evaluation` as a JSON text and back. Its sample is stored apart, where a person can read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from workbench.record.plain_json import dumps, loads
from workbench.train.events import Evaluation


def evaluation_to_json(evaluation: Evaluation, shape: tuple[int, int]) -> str:
    """Everything but step and sample.

    Raises:
        ValueError: loads are no integers of the given shape [L, E].
    """
    for corpus, load_LE in evaluation.load_by_corpus_LE.items():
        if load_LE.shape != shape or load_LE.dtype.kind not in "iu":
            raise ValueError(
                f"the load of {corpus!r} is {load_LE.dtype} of shape {load_LE.shape}; "
                f"integers of shape {shape} are recorded"
            )
    return dumps(
        {
            "nats_per_token": float(evaluation.nats_per_token),
            "nats_per_byte": float(evaluation.nats_per_byte),
            "nats_per_byte_by_corpus": _pairs(evaluation.nats_per_byte_by_corpus),
            "floors_nats_per_byte": _pairs(evaluation.floors_nats_per_byte),
            "floors_nats_per_token": _pairs(evaluation.floors_nats_per_token),
            "mtp_accuracy": _pairs(evaluation.mtp_accuracy),
            "distance_bigram_accuracy": _pairs(evaluation.distance_bigram_accuracy),
            "load_by_corpus": [[corpus, load.tolist()] for corpus, load in evaluation.load_by_corpus_LE.items()],
        }
    )


def _pairs(numbers: Mapping[Any, float]) -> list[list[Any]]:
    """A list of pairs, since keys may be integers and a corpus may have any name."""
    return [[key, float(value)] for key, value in numbers.items()]


def evaluation_from_json(step: int, text: str, sample: str, shape: tuple[int, int]) -> Evaluation:
    """The evaluation that `evaluation_to_json` wrote; loads are int64."""
    plain = loads(text)
    loads_LE = {corpus: np.array(load, np.int64).reshape(shape) for corpus, load in plain["load_by_corpus"]}
    return Evaluation(
        step=step,
        nats_per_token=plain["nats_per_token"],
        nats_per_byte=plain["nats_per_byte"],
        nats_per_byte_by_corpus=dict(plain["nats_per_byte_by_corpus"]),
        floors_nats_per_byte=dict(plain["floors_nats_per_byte"]),
        floors_nats_per_token=dict(plain.get("floors_nats_per_token", ())),  # runs before 2026-11-25 lack it
        mtp_accuracy=dict(plain["mtp_accuracy"]),
        distance_bigram_accuracy=dict(plain["distance_bigram_accuracy"]),
        load_by_corpus_LE=loads_LE,
        sample=sample,
    )
