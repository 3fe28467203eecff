"""The Triton twin of grouped_mm; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from grouped_cases import CLAMPED, NAN, OPTIONS, make, make_with_options
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_obeys_rule, results

from workbench_kernels import grouped_mm
from workbench_kernels.fused import grouped_mm as twin
from workbench_kernels.grouped_mm import reference

fused = partial(grouped_mm, impl="fused")
LARGE = (40, 136, 72) if INTERPRETED else (4096, 2048, 768)
MUTATIONS = [
    Mutation("grouped_mm_fwd_kernel", "inside = k < K", "inside = k < K - 1"),
    Mutation("grouped_mm_fwd_kernel", "known = row < end", "known = row < end - 1"),
    Mutation("grouped_mm_fwd_kernel", "depth = tl.where(expert < E, K, 0)", "depth = K"),
    Mutation("grouped_mm_fwd_kernel", "if TURNED:", "if not TURNED:"),
    Mutation("grouped_mm_bwd_weight_kernel", "known = row < end", "known = row < end - 1"),
    Mutation("grouped_mm_bwd_weight_kernel", "start = tl.load(offs_ptr + expert - 1", "start = tl.load(offs_ptr"),
]
OPTION_MUTATIONS = [
    Mutation("grouped_mm_fwd_kernel", "// GATHER_DIV", "// (2 * GATHER_DIV)"),
    Mutation("grouped_mm_fwd_kernel", "tl.load(scale_ptr + row", "tl.load(scale_ptr + row * 0"),
    Mutation("grouped_mm_fwd_kernel", "tl.load(biases + N", "tl.load(biases"),
    Mutation("grouped_mm_fwd_kernel", "tl.sigmoid(alpha * gate)", "tl.sigmoid(gate)"),
    Mutation("grouped_mm_fwd_kernel", "tl.where(up > limit, limit", "tl.where(up > limit, -limit"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (60, 129), (129, 60), (64, 128)])
def test_obeys_the_rule(k: int, n: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(fused, reference, make([0, 60, 1, 0, 129, 0], k, n, dtype, 3, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5], [0, 9, 0], [0, 0], [3, 0, 4], [300, 0, 0, 400]])
def test_obeys_the_rule_for_one_all_and_no_rows(sizes: list[int], dtype: torch.dtype) -> None:
    assert_obeys_rule(fused, reference, make(sizes, 64, 32, dtype, 2, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_obeys_the_rule_for_larger_groups(dtype: torch.dtype) -> None:
    rows, k, n = LARGE
    assert_obeys_rule(fused, reference, make([rows, 1, 0, 2 * rows], k, n, dtype, 5, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("width", [7, 32])
def test_options_obey_the_rule(width: int, name: str, dtype: torch.dtype) -> None:
    inputs, ours, definition = make_with_options([0, 9, 1, 0], width, 8, dtype, name, DEVICE, impl="fused")
    assert_obeys_rule(ours, definition, inputs)


def test_rows_and_experts_without_the_other_are_exactly_zero() -> None:
    x, weight, offs = make([4, 0, 3], 16, 16, torch.float32, 2, DEVICE)
    grad = torch.ones(9, 16, device=DEVICE)
    grad[7:] = NAN
    output, grad_x, grad_weight = results(fused, (x, weight, offs), grad)
    for tensor in (output[7:], grad_x[7:], grad_weight[1]):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert grad_weight.isfinite().all()


def test_the_result_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of the picker, for shapes that fill none of them."""
    x, weight, offs = make([70, 0, 20], 72, 200, torch.float32, 3, DEVICE)
    expected = reference(x, weight, offs)
    tiles = {tile for (_, itemsize), tile in twin.LARGE.items() if itemsize == 4}
    if INTERPRETED:
        tiles |= {*twin.LARGE.values(), *twin.UNALIGNED.values()}
    for tile in tiles:
        monkeypatch.setattr(twin, "launch_for", lambda *_, tile=tile: tile)
        torch.testing.assert_close(fused(x, weight, offs), expected, rtol=1e-5, atol=1e-5)


def test_takes_strides_and_stays_within_its_tensors() -> None:
    inputs, ours, _ = make_with_options([0, 9, 1, 0], 8, 8, torch.float32, "all", DEVICE, impl="fused")
    strided = [torch.stack([tensor, tensor + 1], dim=-1)[..., 0] for tensor in inputs]
    with torch.no_grad():
        torch.testing.assert_close(ours(*strided), ours(*inputs), rtol=0, atol=0)
    x, weight, offs = make([4, 3], 16, 16, torch.float32, device=DEVICE)
    beyond = torch.stack([offs + 20, offs], dim=-1)[:, 0]
    assert fused(x, weight, beyond).shape == (7, 16)


def test_no_number_is_not_clamped_away() -> None:
    x, weight, offs = make([2, 3], 8, 16, torch.float32, device=DEVICE)
    x[1] = NAN
    with torch.no_grad():
        found = fused(x, weight, offs, activation=CLAMPED)
    assert found[1].isnan().all() and found[0].isfinite().all()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    def proof() -> None:
        assert_obeys_rule(fused, reference, make([0, 20, 1], 65, 33, torch.float32, 3, DEVICE))

    assert_seen("grouped_mm", mutation, tmp_path, proof)


@pytest.mark.parametrize("mutation", OPTION_MUTATIONS)
def test_sees_a_kernel_with_a_mutated_option(mutation: Mutation, tmp_path: Path) -> None:
    assert_seen("grouped_mm", mutation, tmp_path, partial(test_options_obey_the_rule, 7, "all", torch.float32))


def test_op_is_registered_correctly() -> None:
    x, weight, offs = make([3, 0, 2], 16, 16, torch.float32, device=DEVICE)
    rows = x.clone()
    inputs = (x.requires_grad_(), weight.requires_grad_(), offs, True)
    torch.library.opcheck(torch.ops.workbench_kernels.grouped_mm.default, inputs)
    torch.library.opcheck(torch.ops.workbench_kernels.grouped_mm_weight_grad.default, (rows, rows, offs, True))


def test_compiles_as_one_graph() -> None:
    inputs = make([3, 0, 2], 16, 8, torch.float32, device=DEVICE)
    grad = torch.randn(5, 8, device=DEVICE)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(fused, inputs, grad), rtol=0, atol=0)
