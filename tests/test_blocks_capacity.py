"""Token dropping: who is dropped, by hand and against a plain loop."""

from __future__ import annotations

from math import ceil
from typing import Literal

import pytest
import torch

from workbench.blocks.capacity import drop_beyond_capacity
from workbench.blocks.router import Routing


def routing_of(indices: list[list[int]], scores: torch.Tensor) -> Routing:
    chosen = torch.tensor(indices)
    load = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
    return Routing(chosen, scores.gather(1, chosen), scores, load)


def drawn(tokens: int, experts: int, per_token: int) -> Routing:
    scores = torch.randn(tokens, experts).softmax(-1)
    return routing_of(scores.topk(per_token, dim=-1).indices.tolist(), scores)


def test_switch_drops_late_tokens_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    routing = routing_of([[0], [0], [0], [1]], scores)
    by_position = drop_beyond_capacity(routing, 1.0)
    assert by_position.kept.flatten().tolist() == [True, True, False, True]
    assert torch.equal(by_position.routing.weights.flatten(), torch.tensor([0.9, 0.6, 0.0, 0.7]))
    assert by_position.routing.load.tolist() == [3, 1], "load is what the router chose"
    by_score = drop_beyond_capacity(routing, 1.0, priority="score")
    assert by_score.kept.flatten().tolist() == [True, False, True, True]


def test_first_choices_stand_before_second_ones() -> None:
    scores = torch.tensor([[0.4, 0.6], [0.7, 0.3]])
    # Two choices per token, one place per expert: token 1's first choice outranks token 0's second.
    kept = drop_beyond_capacity(routing_of([[1, 0], [0, 1]], scores), 0.5).kept
    assert kept.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize(("devices", "factor"), [(None, 1.0), (None, 0.3), (2, 1.0), (4, 0.75), (1, 0.5)])
def test_equals_a_plain_loop(priority: Literal["position", "score"], devices: int | None, factor: float) -> None:
    torch.manual_seed(0)
    routing = drawn(tokens=37, experts=8, per_token=3)
    count = devices or 8
    room = ceil(factor * 37 * 3 / count)
    line = [(rank, token) for rank in range(3) for token in range(37)]
    if priority == "score":
        line.sort(key=lambda place: -routing.scores[place[1], routing.indices[place[1], place[0]]].item())
    used, expected = [0] * count, torch.zeros(37, 3, dtype=torch.bool)
    for rank, token in line:
        device = int(routing.indices[token, rank]) // (8 // count)
        expected[token, rank] = used[device] < room
        used[device] += 1
    dropping = drop_beyond_capacity(routing, factor, num_devices=devices, priority=priority)
    assert torch.equal(dropping.kept, expected)
    assert torch.equal(dropping.routing.weights, routing.weights * expected)


def test_enough_room_drops_nothing_and_dropped_choices_take_no_gradient() -> None:
    torch.manual_seed(0)
    routing = drawn(tokens=16, experts=4, per_token=2)
    assert drop_beyond_capacity(routing, 4.0).kept.all()
    weights = routing.weights.clone().requires_grad_()
    dropping = drop_beyond_capacity(routing._replace(weights=weights), 0.5)
    dropping.routing.weights.sum().backward()
    assert weights.grad is not None and torch.equal(weights.grad, dropping.kept.float())
    assert not dropping.kept.all()


def test_impossible_settings_are_refused() -> None:
    routing = drawn(tokens=4, experts=4, per_token=1)
    with pytest.raises(ValueError, match=r"capacity_factor=0\.0 must be a finite number above 0"):
        drop_beyond_capacity(routing, 0.0)
    with pytest.raises(ValueError, match=r"num_devices=3 must divide the 4 experts"):
        drop_beyond_capacity(routing, 1.0, num_devices=3)
