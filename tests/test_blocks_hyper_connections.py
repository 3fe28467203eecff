"""Hyper-connections: equal to the reference; the mixing matrix is doubly stochastic and applied the right way round."""

from __future__ import annotations

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
from torch import Tensor

from workbench.blocks.hyper_connections import Connection, HyperConnection, HyperHead, doubly_stochastic, write_back

WIDTH, STREAMS, ITERATIONS = 20, 3, 7
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def connection() -> HyperConnection:
    return HyperConnection(WIDTH, STREAMS, hc_sinkhorn_iters=ITERATIONS, hc_eps=1e-6, eps=1e-6)


def streams(dtype: torch.dtype = torch.float64, *, length: int = 13) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randn(2, length, STREAMS, WIDTH, generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize("length", [1, 13])
def test_a_site_equals_the_reference(dtype: torch.dtype, allowed: float, length: int) -> None:
    theirs: Any = with_random_weights(
        reference(dtype).DeepseekV4HyperConnection(tiny_config("sliding_attention")), dtype
    )
    ours = with_weights_of(connection(), theirs, dtype)
    x = streams(dtype, length=length)
    mine, (post, mixing, collapsed) = ours(x), theirs(x)
    output = collapsed.sin()
    peer = post.unsqueeze(-1) * output.unsqueeze(-2) + mixing.transpose(-1, -2) @ x
    pairs = {
        "collapsed": (mine.collapsed, collapsed),
        "post": (mine.post, post),
        "mixing": (mine.mixing, mixing),
        "streams": (write_back(x, output, mine), peer),
    }
    assert all(a.dtype == b.dtype == dtype for a, b in pairs.values())
    differences = {name: largest_difference(*pair) for name, pair in pairs.items()}
    for a in (write_back(x, mine.collapsed.sin(), mine), peer):
        a.square().sum().backward()
    peer_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        differences[name] = largest_difference(parameter.grad, peer_parameters[name].grad)
    assert max(differences.values()) <= allowed, differences


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
def test_the_head_equals_the_reference(dtype: torch.dtype, allowed: float) -> None:
    theirs: Any = with_random_weights(reference(dtype).DeepseekV4HyperHead(tiny_config("sliding_attention")), dtype)
    ours = with_weights_of(HyperHead(WIDTH, STREAMS, hc_eps=1e-6, eps=1e-6), theirs, dtype)
    mine, peer = ours(streams(dtype)), theirs(streams(dtype))
    assert mine.dtype == dtype
    assert largest_difference(mine, peer) <= allowed


def test_rows_and_columns_sum_to_one() -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = doubly_stochastic(torch.randn(50, 4, 4, generator=draw, dtype=torch.float64), iterations=50, eps=1e-12)
    assert (matrix > 0).all()
    ones = torch.ones(50, 4, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(-2), ones, rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.sum(-1), ones, rtol=0, atol=1e-6)
    assert (torch.linalg.matrix_norm(matrix, ord=2) < 1 + 1e-6).all()


def test_more_iterations_bring_rows_nearer_to_one() -> None:
    logits = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = [(doubly_stochastic(logits, iterations=n, eps=1e-12).sum(-1) - 1).abs().max() for n in (1, 5, 20)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_one_iteration_by_hand() -> None:
    """exp of the logits is [[1, 3], [1, 1]]: rows give [[1/4, 3/4], [1/2, 1/2]], then columns are divided by theirs."""
    matrix = doubly_stochastic(torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log(), iterations=1, eps=0.0)
    torch.testing.assert_close(matrix, torch.tensor([[1 / 3, 3 / 5], [2 / 3, 2 / 5]]))


def test_the_matrix_is_applied_transposed_by_hand() -> None:
    """Stream 0 goes to stream 1 for a quarter (row 0, column 1); the output is added twice and half."""
    before = torch.tensor([[[[4.0], [8.0]]]])
    mixing = torch.tensor([[[[0.75, 0.25], [0.5, 0.5]]]])
    kept = Connection(torch.zeros(1, 1, 1), torch.tensor([[[2.0, 0.5]]]), mixing)
    after = write_back(before, torch.tensor([[[10.0]]]), kept)
    assert after.flatten().tolist() == [4 * 0.75 + 8 * 0.5 + 20, 4 * 0.25 + 8 * 0.5 + 5]


def test_weights_by_hand() -> None:
    """`fn` of zeros leaves the static part: sigmoids of `base`, and a matrix of equal entries."""
    site = connection()
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.zero_()
        site.base[0] = 100.0
        made = site(streams(torch.float32))
    x = streams(torch.float32)
    torch.testing.assert_close(made.collapsed, x[:, :, 0] + 0.5 * (x[:, :, 1] + x[:, :, 2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.post, torch.ones(2, 13, STREAMS))
    torch.testing.assert_close(made.mixing, torch.full((2, 13, STREAMS, STREAMS), 1 / 3), rtol=1e-5, atol=1e-5)


def test_mixing_passes_the_sum_of_the_streams_on() -> None:
    site = connection()
    site.hc_sinkhorn_iters = 200
    with_random_weights(site, torch.float64)
    x = streams()
    made = site(x)
    after = write_back(x, torch.zeros_like(made.collapsed), made)
    torch.testing.assert_close(after.sum(2), x.sum(2), rtol=0, atol=1e-3)


def test_sixteen_bit_streams_have_float32_weights() -> None:
    site = connection()
    with_random_weights(site, torch.bfloat16)
    x = streams(torch.bfloat16)
    made = site(x)
    assert (made.collapsed.dtype, made.post.dtype, made.mixing.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert write_back(x, made.collapsed, made).dtype == torch.bfloat16
    torch.testing.assert_close(made.mixing.sum(-2), torch.ones(2, 13, STREAMS), rtol=0, atol=1e-4)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        doubly_stochastic(torch.zeros(2, 2), iterations=0, eps=1e-6)
    with pytest.raises(ValueError, match="hc_mult=0 must be at least 1"):
        HyperConnection(8, 0, hc_sinkhorn_iters=2, hc_eps=1e-6, eps=1e-6)
