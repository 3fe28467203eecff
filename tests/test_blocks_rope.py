"""Rotary positions: distance is all that counts, and the layouts are really different."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.blocks.rope import (
    frequencies,
    rotate_halves,
    rotate_interleaved,
    rotation,
    yarn_frequencies,
    yarn_mscale,
)

CPU = torch.device("cpu")
LAYOUTS = [rotate_interleaved, rotate_halves]


def turn_at(positions: list[int], width: int = 8):
    return rotation(torch.tensor(positions), frequencies(width, 100.0, dtype=torch.float64, device=CPU))


@pytest.mark.parametrize("rotate", LAYOUTS)
def test_scores_depend_on_distance_alone(rotate) -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [
        (rotate(query, turn_at([q])) * rotate(key, turn_at([k]))).sum() for q, k in [(3, 1), (10, 8), (1002, 1000)]
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    nearer = (rotate(query, turn_at([3])) * rotate(key, turn_at([2]))).sum()
    assert not torch.isclose(nearer, scores[0])


def test_a_quarter_turn_by_hand() -> None:
    quarter = rotation(torch.tensor([1]), torch.tensor([math.pi / 2], dtype=torch.float64))
    x = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 1, 1, 2)
    torch.testing.assert_close(rotate_interleaved(x, quarter).flatten(), torch.tensor([-5.0, 3.0], dtype=torch.float64))


def test_layouts_pair_different_numbers() -> None:
    x = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 4)
    assert rotate_interleaved(x, turn_at([1], 4)).flatten().nonzero().flatten().tolist() == [0, 1]
    assert rotate_halves(x, turn_at([1], 4)).flatten().nonzero().flatten().tolist() == [0, 2]


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = frequencies(64, 1e4, dtype=torch.float64, device=CPU)
    stretched = yarn_frequencies(
        64,
        1e4,
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        dtype=torch.float64,
        device=CPU,
    )
    torch.testing.assert_close(stretched[:8], plain[:8])
    torch.testing.assert_close(stretched[-5:], plain[-5:] / 40)
    assert (stretched[1:] < stretched[:-1]).all()


def test_yarn_mscale_has_the_published_values() -> None:
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.368888, abs=1e-6)
    assert yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(1.873854, abs=1e-6)
    assert yarn_mscale(40.0, 0.707) ** 2 == pytest.approx(1.589626, abs=1e-6)
    assert yarn_mscale(1.0, 1.0) == 1.0
