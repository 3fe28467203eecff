"""The router and what keeps it balanced."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.blocks.balance import balance_loss, choice_counts, communication_loss, device_loss, updated_bias
from workbench.blocks.router import Router, Routing
from workbench.model.initial import initialize
from workbench_kernels.moe_route import best


def make(**changes: object) -> Router:
    torch.manual_seed(0)
    settings: dict = {
        "num_experts_per_tok": 3,
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    router = Router(16, 12, **{**settings, **changes})
    initialize(router, std=0.5)
    return router


def logits_router(**changes: object) -> Router:
    """A router over two experts per group whose scores are the inputs themselves."""
    router = Router(
        4,
        4,
        **{
            "num_experts_per_tok": 2,
            "scoring_func": "softmax",
            "n_group": 2,
            "topk_group": 1,
            "group_score": "max",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            **changes,
        },
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        router.e_score_correction_bias.zero_()
    return router


def test_weights_sum_to_the_scale_and_load_counts_choices() -> None:
    routing = make()(torch.randn(50, 16))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((50,), 2.5))
    assert routing.load.sum() == 50 * 3
    assert (routing.indices.sort(-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"


def test_choices_stay_within_the_best_groups() -> None:
    routing = make()(torch.randn(200, 16))
    groups = routing.indices // 3
    assert max(len(set(row)) for row in groups.tolist()) <= 2


def test_group_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.4, 0.05, 0.3, 0.25]])
    by_best = logits_router()(probabilities.log())
    assert sorted(by_best.indices[0].tolist()) == [0, 1]
    by_best_two = logits_router(group_score="top2")(probabilities.log())
    assert sorted(by_best_two.indices[0].tolist()) == [2, 3]
    torch.testing.assert_close(by_best_two.weights[0].sort().values, torch.tensor([0.25, 0.3]))


def test_equal_scores_choose_the_lowest_index() -> None:
    assert best(torch.zeros(1, 64), 4).tolist() == [[0, 1, 2, 3]]
    assert best(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 3, 2]]
    assert make()(torch.zeros(2, 16)).indices.tolist() == [[0, 1, 2]] * 2


def test_bias_moves_the_choice_and_never_the_mixture() -> None:
    router, x = make(n_group=1, topk_group=1), torch.randn(40, 16)
    before = router(x)
    router.e_score_correction_bias[5] = 10.0
    after = router(x)
    assert (after.indices == 5).any(-1).all() and not (before.indices == 5).any(-1).all()
    chosen_scores = after.scores.gather(1, after.indices)
    torch.testing.assert_close(after.weights, 2.5 * chosen_scores / chosen_scores.sum(-1, keepdim=True))
    torch.testing.assert_close(after.scores, before.scores, rtol=0, atol=0)


def test_a_masked_group_never_wins_although_biased_scores_are_negative() -> None:
    router = make()
    router.e_score_correction_bias.fill_(-5.0)
    groups = router(torch.randn(200, 16)).indices // 3
    assert max(len(set(row)) for row in groups.tolist()) <= 2


def test_bias_takes_no_gradient_and_stays_float32() -> None:
    router = make()
    router.e_score_correction_bias[0] = 1.0 + 2**-20
    kept = router.e_score_correction_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    torch.testing.assert_close(router.e_score_correction_bias, kept, rtol=0, atol=0)
    router(torch.randn(3, 16, dtype=torch.bfloat16)).weights.sum().backward()
    assert not router.e_score_correction_bias.requires_grad and router.weight.grad is not None


def balanced(num_experts: int, per_token: int, tokens: int) -> Routing:
    indices = (torch.arange(tokens)[:, None] * per_token + torch.arange(per_token)) % num_experts
    scores = torch.full((tokens, num_experts), 0.3)
    return Routing(indices, torch.ones_like(indices, dtype=torch.float32), scores, torch.bincount(indices.flatten()))


@pytest.mark.parametrize(("num_experts", "per_token", "tokens"), [(4, 1, 8), (8, 2, 16), (12, 3, 24)])
def test_balance_loss_is_one_at_perfect_balance(num_experts: int, per_token: int, tokens: int) -> None:
    routing = balanced(num_experts, per_token, tokens)
    assert float(balance_loss(routing, 1)) == pytest.approx(1.0)
    assert float(balance_loss(routing, 2)) == pytest.approx(1.0)


def test_balance_loss_by_hand() -> None:
    # Two sequences of one token each; both send their token to expert 0 of two, with scores 3 : 1.
    scores = torch.tensor([[0.6, 0.2], [0.6, 0.2]])
    routing = Routing(torch.tensor([[0], [0]]), torch.ones(2, 1), scores, torch.tensor([2, 0]))
    assert float(balance_loss(routing, 1)) == pytest.approx(2 * 1.0 * 0.75)
    # One sequence per expert: balanced over the batch, not within a sequence.
    split = Routing(
        torch.tensor([[0], [1]]), torch.ones(2, 1), torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.ones(2).long()
    )
    assert float(balance_loss(split, 1)) == pytest.approx(1.0)
    assert float(balance_loss(split, 2)) == pytest.approx(1.8)


def test_balance_loss_pulls_scores_of_busy_experts_down() -> None:
    scores = torch.full((6, 3), 0.5, requires_grad=True)
    indices = torch.zeros(6, 1, dtype=torch.int64)
    balance_loss(Routing(indices, torch.ones(6, 1), scores, torch.tensor([6, 0, 0])), 1).backward()
    assert scores.grad is not None and (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()


@pytest.mark.parametrize(("num_experts", "per_token", "tokens"), [(4, 1, 8), (8, 2, 16), (12, 3, 24)])
def test_device_losses_are_one_at_perfect_balance(num_experts: int, per_token: int, tokens: int) -> None:
    routing = balanced(num_experts, per_token, tokens)
    assert float(device_loss(routing, 4)) == pytest.approx(1.0)
    spread = routing._replace(indices=routing.indices * (num_experts // per_token) % num_experts)
    reached = len(set((spread.indices[0] // (num_experts // 4)).tolist()))
    assert reached == per_token
    shifted = spread.indices + torch.arange(tokens)[:, None] * (num_experts // 4)
    even = routing._replace(indices=shifted % num_experts)
    assert float(communication_loss(even, 4, devices_per_token=per_token)) == pytest.approx(1.0)


def test_device_losses_by_hand() -> None:
    # Experts 0 and 1 live on device 0, 2 and 3 on device 1. Three of four choices go to device 0.
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1]])
    indices = torch.tensor([[0, 1], [0, 2]])
    routing = Routing(indices, torch.ones(2, 2), scores, torch.tensor([2, 1, 1, 0]))
    # Mean scores of the devices: 0.65 and 0.35.
    assert float(device_loss(routing, 2)) == pytest.approx(1.5 * 0.65 + 0.5 * 0.35)
    # Both tokens are sent to device 0 (the first once, though it visits two experts), one to device 1.
    assert float(communication_loss(routing, 2, devices_per_token=2)) == pytest.approx(1.0 * 0.65 + 0.5 * 0.35)
    # One device per expert: the device loss is the expert loss.
    assert float(device_loss(routing, 4)) == pytest.approx(float(balance_loss(routing, 1)))


def test_a_device_with_one_busy_expert_is_balanced() -> None:
    indices = torch.tensor([[0], [2]])
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    routing = Routing(indices, torch.ones(2, 1), scores, torch.tensor([1, 0, 1, 0]))
    assert float(device_loss(routing, 2)) == pytest.approx(1.0)
    assert float(balance_loss(routing, 1)) > 1.5


def test_device_losses_pull_scores_of_busy_devices_down() -> None:
    for loss in (lambda r: device_loss(r, 2), lambda r: communication_loss(r, 2, devices_per_token=1)):
        scores = torch.full((6, 4), 0.5, requires_grad=True)
        loss(Routing(torch.ones(6, 1).long(), torch.ones(6, 1), scores, torch.tensor([0, 6, 0, 0]))).backward()
        assert scores.grad is not None and (scores.grad[:, :2] > 0).all() and (scores.grad[:, 2:] < 0).all()


def test_impossible_devices_are_refused() -> None:
    routing = balanced(4, 1, 8)
    with pytest.raises(ValueError, match=r"num_devices=3 must divide the 4 experts"):
        device_loss(routing, 3)
    with pytest.raises(ValueError, match=r"devices_per_token=3 must lie in 1..2 \(num_devices\)"):
        communication_loss(routing, 2, devices_per_token=3)


def test_counts_by_sequence() -> None:
    indices = torch.tensor([[[0, 1], [0, 2]], [[2, 1], [2, 1]]])
    assert choice_counts(indices, 4).tolist() == [[2, 1, 1, 0], [0, 2, 2, 0]]


def test_bias_update_by_hand() -> None:
    bias, load = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([9, 3, 0])
    torch.testing.assert_close(updated_bias(bias, load, speed=0.1), torch.tensor([-0.1, 0.6, -0.4]))
    centred = updated_bias(bias, load, speed=0.1, centred=True)
    assert math.isclose(float(centred.sum()), 0.0, abs_tol=1e-6)
    torch.testing.assert_close(centred - centred[0], updated_bias(bias, load, speed=0.1) + 0.1)
    torch.testing.assert_close(updated_bias(bias, torch.tensor([4, 4, 4]), speed=0.1), bias)
