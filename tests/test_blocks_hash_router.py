"""The hash router: equal to the reference, choices from the table alone, weights from the learned gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepseek_v4_reference import (
    largest_difference,
    reference,
    tiny_config,
    with_random_weights,
    with_weights_of,
)

from workbench.blocks.hash_router import HashRouter
from workbench.blocks.router import Router
from workbench_kernels.moe_route import ScoringFunction

WIDTH, EXPERTS, VOCAB, ACTIVE = 20, 7, 31, 3
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_experts_per_tok": ACTIVE,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}


def table() -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.rand(VOCAB, EXPERTS, generator=draw).argsort(-1)[:, :ACTIVE]


def make(**changes: object) -> HashRouter:
    settings: dict[str, Any] = SETTINGS | changes
    router = HashRouter(WIDTH, EXPERTS, **settings)
    with_random_weights(router, torch.float64)
    router.tid2eid.copy_(table())
    return router


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(29, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, VOCAB, (29,), generator=draw)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])  # it names softmax and lacks it
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_routing_equals_the_reference(scoring_func: str, dtype: torch.dtype, allowed: float) -> None:
    config = tiny_config("sliding_attention", scoring_func=scoring_func)
    theirs: Any = with_random_weights(reference(dtype).DeepseekV4HashRouter(config), dtype)
    theirs.tid2eid.copy_(table())
    settings: dict[str, Any] = SETTINGS | {"scoring_func": scoring_func}
    ours = with_weights_of(HashRouter(WIDTH, EXPERTS, **settings), theirs, dtype)
    x, tokens = inputs(dtype)
    mine, (logits, weights, indices) = ours(x, tokens), theirs(x, tokens)
    assert mine.weights.dtype == mine.scores.dtype == dtype
    torch.testing.assert_close(mine.indices, indices, rtol=0, atol=0)
    difference = max(
        largest_difference(mine.weights, weights), largest_difference(mine.scores, theirs.score_fn(logits))
    )
    assert difference <= allowed


def test_the_table_chooses_and_the_gate_weighs() -> None:
    router = make()
    x, tokens = inputs()
    routing, other = router(x, tokens), router(x + 1, tokens)
    torch.testing.assert_close(routing.indices, table()[tokens], rtol=0, atol=0)
    torch.testing.assert_close(routing.indices, other.indices, rtol=0, atol=0)
    assert not torch.allclose(routing.weights, other.weights)
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((29,), 1.5, dtype=torch.float64))
    assert routing.load.tolist() == [int((table()[tokens] == e).sum()) for e in range(EXPERTS)]
    routing.weights[:, 0].sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


def test_by_hand() -> None:
    """Logits ln(e^1 - 1) and ln(e^4 - 1) have softplus 1 and 4, hence scores 1 and 2: weights 1/3 and 2/3, times 3."""
    router = HashRouter(
        1,
        3,
        vocab_size=2,
        num_experts_per_tok=2,
        scoring_func="sqrtsoftplus",
        norm_topk_prob=True,
        routed_scaling_factor=3.0,
    )
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[math.log(math.expm1(1))], [50.0], [math.log(math.expm1(4))]]))
    router.tid2eid.copy_(torch.tensor([[1, 0], [2, 0]]))
    routing = router(torch.ones(1, 1), torch.tensor([1]))
    assert routing.indices.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights, torch.tensor([[2.0, 1.0]]))
    assert routing.load.tolist() == [1, 0, 1]


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_a_table_of_the_learned_choices_gives_the_learned_weights(
    scoring_func: ScoringFunction, norm_topk_prob: bool
) -> None:
    shared: dict[str, Any] = {
        "num_experts_per_tok": ACTIVE,
        "scoring_func": scoring_func,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 1.5,
    }
    learned = Router(WIDTH, EXPERTS, n_group=1, topk_group=1, group_score="max", **shared)
    with_random_weights(learned, torch.float64)
    learned.e_score_correction_bias.zero_()
    x = inputs()[0][:VOCAB]
    expected = learned(x)
    router = make(scoring_func=scoring_func, norm_topk_prob=norm_topk_prob)
    router.load_state_dict({"weight": learned.weight, "tid2eid": table()})
    router.tid2eid[: len(x)] = expected.indices
    routing = router(x, torch.arange(len(x)))
    for name in routing._fields:
        torch.testing.assert_close(getattr(routing, name), getattr(expected, name), rtol=0, atol=0)


def test_the_table_stays_whole_and_scores_stay_wide_in_sixteen_bits() -> None:
    router = make().to(torch.bfloat16)
    x, tokens = inputs(torch.bfloat16)
    routing = router(x, tokens)
    assert router.tid2eid.dtype == torch.int64 and "tid2eid" in router.state_dict()
    assert routing.scores.dtype == routing.weights.dtype == torch.float32


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok=8 must lie in 1..7 \(n_routed_experts\)"):
        make(num_experts_per_tok=8)
