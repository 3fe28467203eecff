"""The Triton twin of moe_route, and the kernels that order pairs by expert; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, assert_obeys_rule
from routing_cases import OPTIONS, assert_same_choice, differentiable, make_logits

from workbench_kernels import moe_route
from workbench_kernels.expert_tiles import expert_order, reference, tile_map
from workbench_kernels.fused import expert_tiles as fused_tiles

ROUTE_MUTATIONS = [
    Mutation("moe_route_fwd_kernel", "* routed_scaling_factor", "+ routed_scaling_factor"),
    Mutation("moe_route_fwd_kernel", "expert // (E // J)", "expert % (E // J)"),
    Mutation("moe_route_fwd_kernel", "biased = tl.where(dropped", "biased = tl.where(dropped & (expert > 0)[None, :]"),
    Mutation("moe_route_fwd_kernel", "expert[None, :] != first[:, None]), biased", "expert[None, :] >= 0), biased"),
    Mutation("moe_route_fwd_kernel", "inside & (free == 0)", "inside & (free == 1)"),
    Mutation("moe_route_bwd_kernel", "(of_weight - along)", "(of_weight + along)"),
    Mutation("moe_route_bwd_kernel", "grad * scores * (1.0 - scores)", "grad * scores"),
]
ORDER_MUTATIONS = [
    Mutation("expert_count_kernel", "pair < num_pairs", "pair < num_pairs - 1"),
    Mutation("expert_sum_kernel", "total += ", "total = "),
    Mutation("expert_place_kernel", "place[None, :] < place[:, None]", "place[None, :] > place[:, None]"),
    Mutation("expert_tile_kernel", "last[None, :] <= tile", "last[None, :] < tile"),
    Mutation("expert_tile_kernel", "+ TILE_ROWS - 1", "+ TILE_ROWS"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_obeys_the_rule(name: str, dtype: torch.dtype) -> None:
    logits, bias = make_logits(43, 12, dtype, DEVICE)
    options = {"active": 3, "bias": bias, **OPTIONS[name]}
    fused, definition = (partial(differentiable, **options, impl=impl) for impl in ("fused", "reference"))
    assert_obeys_rule(fused, definition, [logits])


@pytest.mark.parametrize(("tokens", "experts", "active"), [(0, 4, 2), (1, 1, 1), (60, 129, 6), (129, 60, 60)])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_chooses_and_orders_as_the_definition(tokens: int, experts: int, active: int, scoring_func: str) -> None:
    logits, bias = make_logits(tokens, experts, torch.float32, DEVICE)
    options = {"scoring_func": scoring_func, "bias": bias, "tile_rows": 16}
    fused, definition = (moe_route(logits, active, **options, impl=impl) for impl in ("fused", "reference"))
    assert_same_choice(fused, definition)


@pytest.mark.parametrize("n_group", [1, 2])
def test_equal_scores_go_to_the_lowest_index(n_group: int) -> None:
    logits = torch.zeros(5, 8, device=DEVICE)
    options = {"scoring_func": "sigmoid", "n_group": n_group, "topk_group": 1}
    assert moe_route(logits, 3, **options, impl="fused").indices.tolist() == [[0, 1, 2]] * 5


def test_no_number_stays_within_bounds_and_with_its_token() -> None:
    logits = make_logits(3, 6, torch.float32, DEVICE)[0]
    clean = moe_route(logits, 2, scoring_func="sigmoid", impl="fused")
    logits[1, 4] = torch.nan
    found = moe_route(logits, 2, scoring_func="sigmoid", impl="fused")
    assert found.indices[1, 0] == 4
    assert torch.equal(found.indices[::2], clean.indices[::2])


def choices(pairs: int, experts: int, used: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(used, (pairs, 1)).to(DEVICE)


@pytest.mark.parametrize(
    ("pairs", "experts", "used"), [(0, 3, 1), (1, 1, 1), (300, 40, 33), (129, 5, 1), (9000, 7, 7), (60, 129, 129)]
)
def test_orders_pairs_as_the_definition(pairs: int, experts: int, used: int) -> None:
    indices = choices(pairs, experts, used)
    fused, definition = expert_order(indices, experts, tile_rows=16, fused=True), reference(indices, experts, 16)
    for name, ours, theirs in zip(definition._fields, fused, definition, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@pytest.mark.parametrize("owned", [[0, 0, 0], [5, 5, 40], [1, 2, 3], [16, 32, 48]])
def test_maps_rows_that_no_expert_owns(owned: list[int]) -> None:
    offs = torch.tensor(owned, dtype=torch.int32, device=DEVICE)
    assert torch.equal(fused_tiles.tile_map(offs, 57, 16), tile_map(offs, 57, 16))


def proof() -> None:
    for name in ("v2", "v3"):
        logits, bias = make_logits(33, 12, torch.float32, DEVICE)
        options = {"bias": bias, **OPTIONS[name]}
        fused, definition = (moe_route(logits, 3, **options, impl=impl) for impl in ("fused", "reference"))
        assert_same_choice(fused, definition)
        test_obeys_the_rule(name, torch.float32)


@pytest.mark.parametrize("mutation", ROUTE_MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    assert_seen("moe_route", mutation, tmp_path, proof)


@pytest.mark.parametrize("mutation", ORDER_MUTATIONS)
def test_sees_a_mutated_kernel_of_the_order(mutation: Mutation, tmp_path: Path) -> None:
    assert_seen("expert_tiles", mutation, tmp_path, partial(test_orders_pairs_as_the_definition, 9000, 7, 7))


def test_ops_are_registered_correctly() -> None:
    logits, bias = make_logits(9, 8, torch.float32, DEVICE)
    options = ("sigmoid", 4, 2, "top2", True, 1.5)
    torch.library.opcheck(torch.ops.workbench_kernels.moe_route.default, (logits.requires_grad_(), bias, 3, *options))
    torch.library.opcheck(torch.ops.workbench_kernels.expert_order.default, (choices(40, 8, 8), 8, 16, True))


def test_compiles_as_one_graph() -> None:
    logits, bias = make_logits(9, 8, torch.float32, DEVICE)
    op = partial(differentiable, active=3, bias=bias, **OPTIONS["v3"], tile_rows=16, impl="fused")
    assert torch.equal(torch.compile(op, backend="aot_eager", fullgraph=True)(logits), op(logits))


def test_refuses_wide_logits_and_too_many_tiles() -> None:
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16"):
        moe_route(torch.zeros(1, 4, dtype=torch.float64, device=DEVICE), 2, scoring_func="sigmoid", impl="fused")
    for fused in (True, False):
        with pytest.raises(ValueError, match="40000 rows are more than 32767 tiles of 1"):
            expert_order(choices(40_000, 1, 1), 1, tile_rows=1, fused=fused)


def test_experts_that_are_not_there_have_no_rows() -> None:
    order = expert_order(torch.tensor([[0], [7], [-1], [2]], device=DEVICE), 3, tile_rows=16, fused=True)
    assert order.offs.tolist() == [1, 1, 2] and order.pair.tolist() == [0, 3, 0, 0]


def test_refuses_too_many_experts() -> None:
    with pytest.raises(ValueError, match="up to 1024 experts, not 1025"):
        moe_route(torch.zeros(1, 1025, device=DEVICE), 2, scoring_func="sigmoid", impl="fused")
    with pytest.raises(ValueError, match="up to 2047 experts, not 2048"):
        expert_order(choices(4, 2048, 2048), 2048, tile_rows=16, fused=True)
