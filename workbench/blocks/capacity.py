"""Capacity: what experts of fixed size do with more tokens than they have room for. They drop them."""

from __future__ import annotations

from math import ceil
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.blocks.router import Routing


class Dropping(NamedTuple):
    """`routing` with weight 0 for every dropped choice, and which choices were kept.

    `routing.load` still counts what the router chose: balance is judged before anything is dropped.
    """

    routing: Routing
    kept: Bool[Tensor, "N A"]


def drop_beyond_capacity(
    routing: Routing,
    capacity_factor: float,
    *,
    num_devices: int | None = None,
    priority: Literal["position", "score"] = "position",
) -> Dropping:
    """Keep at most `capacity_factor` times an equal share of the N*A choices for each expert; drop the others.

    Dropped choices add nothing: the token goes on in the residual stream. With `num_devices`, the room is that of a
    device, an equal run of consecutive experts, and not of each expert. `priority="position"` keeps first choices
    before second ones and earlier tokens before later ones (Switch, GShard): a token may be dropped because of others
    in its batch, yet no later choice of its own rank takes its place. `"score"` keeps the largest scores (V2).
    Weights are not renormalised after dropping. Switch is this on top of a router with one expert per token.

    Source: Switch Transformers, arXiv 2101.03961, section 2.2; DeepSeek-V2, arXiv 2405.04434, section 2.2.4.

    Raises:
        ValueError: a capacity factor that is not above 0, an unknown priority, or `num_devices` does not divide E.
    """
    num_experts = routing.scores.shape[-1]
    devices = num_experts if num_devices is None else num_devices
    if not 0 < capacity_factor < float("inf"):
        raise ValueError(f"capacity_factor={capacity_factor} must be a finite number above 0")
    if priority not in ("position", "score"):
        raise ValueError(f"priority={priority!r} must be 'position' or 'score'")
    if devices < 1 or num_experts % devices:
        raise ValueError(f"num_devices={devices} must divide the {num_experts} experts")
    # Ranks first, then tokens: all first choices stand before all second ones.
    device_X = (routing.indices // (num_experts // devices)).T.flatten()
    order_X = torch.arange(device_X.numel(), device=device_X.device)
    if priority == "score":
        scores_X = routing.scores.detach().gather(1, routing.indices).T.flatten()
        order_X = scores_X.sort(descending=True, stable=True).indices
    capacity = ceil(capacity_factor * device_X.numel() / devices)
    place_X = torch.empty_like(order_X).scatter(0, order_X, places(device_X[order_X]))
    kept_NA = (place_X < capacity).view(routing.indices.shape[1], -1).T
    return Dropping(routing._replace(weights=routing.weights * kept_NA), kept_NA)


def places(queues: Tensor) -> Tensor:
    """For each entry in line, how many before it wait in the same queue."""
    sorted_X, order_X = queues.sort(stable=True)
    starts_X = torch.searchsorted(sorted_X, sorted_X)
    within_X = torch.arange(queues.numel(), device=queues.device) - starts_X
    return torch.empty_like(order_X).scatter(0, order_X, within_X)
