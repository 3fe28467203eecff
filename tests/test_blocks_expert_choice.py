"""Expert choice: equal loads whatever the scores, and the price of it."""

from __future__ import annotations

import pytest
import torch

from workbench.blocks.expert_choice import ExpertChoiceMixture, ExpertChoiceRouter


def drawn(experts: int = 4, capacity_factor: float = 2.0) -> ExpertChoiceMixture:
    torch.manual_seed(0)
    mixture = ExpertChoiceMixture(8, 6, n_routed_experts=experts, capacity_factor=capacity_factor).double()
    for weight in mixture.parameters():
        torch.nn.init.normal_(weight)
    return mixture


def test_every_expert_takes_equally_many_and_visits_add_up() -> None:
    mixture = drawn(capacity_factor=1.0)
    choice = mixture.gate(torch.randn(20, 8).double())
    assert choice.tokens.shape == (4, 5)
    assert all(len(set(row)) == 5 for row in choice.tokens.tolist())
    assert choice.visits.sum() == 20 and choice.visits.max() > 1
    assert choice.visits.min() == 0, "some token is taken by nobody"


def test_equals_a_plain_loop() -> None:
    mixture = drawn(experts=3, capacity_factor=1.0)
    x = torch.randn(2, 5, 8).double()
    output, choice = mixture(x)
    flat = x.flatten(0, 1)
    scores = (flat @ mixture.gate.weight.T).softmax(-1)
    expected = torch.zeros_like(flat)
    for expert in range(3):
        best = sorted(range(10), key=lambda token: (-scores[token, expert].item(), token))[:4]
        assert choice.tokens[expert].tolist() == best
        gate, up = (flat[best] @ mixture.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        down = (torch.nn.functional.silu(gate) * up) @ mixture.experts.down_proj[expert].T
        expected[best] += scores[best, expert, None] * down
    assert torch.allclose(output, expected.view_as(x), atol=1e-12)


def test_all_weights_learn() -> None:
    mixture = drawn()
    mixture(torch.randn(2, 6, 8).double())[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in mixture.parameters())


def test_a_later_token_changes_earlier_outputs() -> None:
    mixture = drawn(capacity_factor=1.0)
    x = torch.randn(1, 8, 8).double()
    changed = x.clone()
    changed[:, -1] = 10 * mixture.gate.weight[0]
    before, after = mixture(x)[0], mixture(changed)[0]
    assert not torch.equal(before[:, :-1], after[:, :-1])


@pytest.mark.parametrize("capacity_factor", [0.0, 4.5, float("nan")])
def test_impossible_settings_are_refused(capacity_factor: float) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor=.* must lie in \(0, 4\]"):
        ExpertChoiceRouter(8, 4, capacity_factor=capacity_factor)
