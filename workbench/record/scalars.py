"""The named numbers of one step, the same in memory and on disk."""

from __future__ import annotations

import re

from workbench.train.events import Step

_AFTER_LOSSES = (
    "total",
    "nats_per_byte",
    "learning_rate",
    "balance_speed",
    "grad_norm",
    "step_ms",
    "tokens_seen",
)


def scalars_of(event: Step) -> dict[str, float]:
    """Every scalar series of a step by name.

    Raises:
        ValueError: a loss term has the name of another series.
    """
    taken = [name for name in event.losses_nats if name in _AFTER_LOSSES or name.startswith("epochs/")]
    if taken:
        raise ValueError(f"the loss term {taken[0]!r} has the name of another series; call it differently")
    numbers = {name: float(value) for name, value in event.losses_nats.items()}
    numbers["total"] = float(event.total_loss_nats)
    for name in _AFTER_LOSSES[1:]:
        numbers[name] = float(getattr(event, name))
    numbers |= {f"epochs/{corpus}": float(value) for corpus, value in event.epochs.items()}
    return numbers


def display_order(name: str) -> tuple[int, int, str]:
    """Sort key of series names: losses, sums, settings, epochs."""
    if name in _AFTER_LOSSES:
        return (5, _AFTER_LOSSES.index(name), name)
    if name.startswith("epochs/"):
        return (6, 0, name)
    depth = re.fullmatch(r"mtp_(\d+)", name)
    if depth:
        return (1, int(depth[1]), name)
    rank = {"next_token": 0, "balance": 2, "z": 3, "indexer": 4}
    return (rank.get(name, 4), 1 if name not in rank else 0, name)
