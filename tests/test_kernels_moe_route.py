"""moe_route and the order of pairs by expert on the CPU: laws, cases by hand, what they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from routing_cases import OPTIONS, differentiable, make_logits

from workbench_kernels import moe_route
from workbench_kernels.expert_tiles import most_tiles
from workbench_kernels.moe_route import fits_twin
from workbench_kernels.tier import resolve


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_by_finite_differences(name: str) -> None:
    logits, bias = make_logits(5, 12, torch.float64)
    op = partial(differentiable, active=3, bias=bias, **OPTIONS[name])
    assert torch.autograd.gradcheck(op, logits.requires_grad_())


def test_a_case_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 3.0]])
    bias = torch.tensor([0.0, -10.0, 0.0, 0.0])
    routing = moe_route(logits, 2, scoring_func="sigmoid", bias=bias, norm_topk_prob=True, tile_rows=2)
    assert routing.indices.tolist() == [[2, 0], [0, 3]], "the bias moves the choice"
    first = torch.tensor([1.0, 0.0]).sigmoid()
    torch.testing.assert_close(routing.weights, torch.stack((first / first.sum(), torch.tensor([0.5, 0.5]))))
    torch.testing.assert_close(routing.scores, logits.sigmoid())
    assert routing.counts.tolist() == [2, 0, 1, 1]
    assert routing.order is not None
    assert routing.order.offs.tolist() == [2, 2, 3, 4]
    assert routing.order.pair.tolist() == [1, 2, 0, 3]
    assert routing.order.row.tolist() == [[2, 0], [1, 3]]
    assert routing.order.tiles.tolist() == [0, 2, 3, -1, -1, -1]


@pytest.mark.parametrize("tile_rows", [1, 3, 16])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_tiles_cover_every_row_once_and_no_expert_twice(tokens: int, tile_rows: int) -> None:
    logits, _ = make_logits(tokens, 7, torch.float32)
    logits[:, 2] -= 100  # an expert without rows
    order = moe_route(logits, 2, scoring_func="softmax", tile_rows=tile_rows).order
    assert order is not None
    assert len(order.tiles) == most_tiles(2 * tokens, 7, tile_rows)
    starts = [0, *order.offs.tolist()]
    rows = []
    for tile in order.tiles[order.tiles >= 0].tolist():
        expert, local = tile & 0xFFFF, tile >> 16
        first = starts[expert] + local * tile_rows
        assert first < starts[expert + 1]
        rows += range(first, min(first + tile_rows, starts[expert + 1]))
    assert rows == list(range(2 * tokens))
    assert (order.tiles[order.tiles < 0] == -1).all() and 2 not in (order.tiles[order.tiles >= 0] & 0xFFFF)


def test_groups_limit_the_choice() -> None:
    logits, _ = make_logits(40, 12, torch.float32)
    indices = moe_route(logits, 4, scoring_func="sigmoid", n_group=4, topk_group=2).indices
    assert all(len({index // 3 for index in row}) <= 2 for row in indices.tolist())


def test_no_order_is_made_unless_asked_for() -> None:
    assert moe_route(torch.zeros(2, 4), 1, scoring_func="sigmoid").order is None


def test_compiles_as_one_graph() -> None:
    logits, bias = make_logits(9, 12, torch.float32)
    op = partial(differentiable, active=3, bias=bias, **OPTIONS["v3"], tile_rows=16)
    assert torch.equal(torch.compile(op, backend="aot_eager", fullgraph=True)(logits), op(logits))


LOGITS = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": LOGITS.long()}, r"logits \(torch.int64 \[2, 8\]\) must be floating \[N, E\]"),
        ({"logits": torch.zeros(2, 0)}, "with E > 0"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9 must lie in 1\.\.8"),
        ({"num_experts_per_tok": 5, "n_group": 4, "topk_group": 2}, r"must lie in 1\.\.4 \(experts of kept groups\)"),
        ({"n_group": 3}, "n_group=3 must divide the 8 experts"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group=3 must lie in 1\.\.2"),
        ({"bias": torch.zeros(7)}, r"bias \(torch.float32 \[7\]\) must be floating \[8\]"),
        ({"scoring_func": "relu"}, "must be one of softmax, sigmoid, sqrtsoftplus"),
        ({"group_score": "mean"}, "must be max or top2"),
        ({"tile_rows": 0}, "tile_rows=0 must be at least 1"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_route(**{"logits": LOGITS, "num_experts_per_tok": 2, "scoring_func": "sigmoid", **change})


def test_auto_on_a_gpu_takes_the_definition_for_more_experts_than_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    for experts, tier in ((1024, "fused"), (1025, "reference")):
        assert resolve("moe_route", "auto", torch.device("cuda"), torch.float32, fits=fits_twin(experts)) == tier


def test_a_score_that_is_zero_has_a_gradient_of_zero() -> None:
    logits = torch.tensor([[1.0, 0.5, -120.0, 2.0]], requires_grad=True)
    routed = moe_route(logits, 2, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    (grad,) = torch.autograd.grad(routed.weights[0, 0], logits)
    assert grad[0, 0] != 0 and grad[0, 1:3].tolist() == [0, 0] and grad.isfinite().all()
    broken = moe_route(torch.tensor([[1.0, 2.0, torch.nan, 0.0]]), 2, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    assert broken.indices[0, 0] == 2 and broken.weights.isnan().all()
    small = moe_route(torch.tensor([[-100.0, -90.0]]), 1, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    assert small.indices.item() == 1
