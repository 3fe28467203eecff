"""The Triton twin of rope; see tests/test_kernels_twins.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_obeys_rule, turned
from torch import Tensor

from workbench_kernels import rope
from workbench_kernels.rope import reference

LAYOUTS = [True, False]
LARGE = [] if INTERPRETED else [(1, 2000, 128, 64)]
MUTATIONS = [
    Mutation("rope_fwd_kernel", "second * cos + first * sin", "second * cos - first * sin"),
    Mutation("rope_fwd_kernel", "position[:, None] * P", "row[:, None] * P"),
    Mutation("rope_fwd_kernel", "(pair < P)[None, :]", "(pair < P - 1)[None, :]"),
    Mutation("rope_fwd_kernel", "% num_heads) * stride_h", "% num_heads) * (2 * P)"),
]


def make(batch: int, positions: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    angles = 7 * torch.randn(positions, width // 2, device=DEVICE)
    return torch.randn(batch, positions, heads, width).to(DEVICE, dtype), angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 7, 3, 6), (1, 129, 1, 64), (2, 3, 5, 130), *LARGE])
def test_obeys_the_rule(sizes: tuple[int, int, int, int], dtype: torch.dtype, interleaved: bool) -> None:
    x, cos, sin = make(*sizes, dtype)
    fused = partial(rope, impl="fused")
    assert_obeys_rule(turned(fused, interleaved, cos, sin), turned(reference, interleaved, cos, sin), [x])


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_takes_strides(interleaved: bool) -> None:
    x, cos, sin = make(2, 5, 3, 9, torch.float32)
    view = x.transpose(1, 2)[..., 1:7]
    turn = cos[:3, :3], sin[:3, :3]
    found = rope(view, *turn, interleaved=interleaved, impl="fused")
    torch.testing.assert_close(found, reference(view, *turn, interleaved=interleaved), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    assert_seen("rope", mutation, tmp_path, partial(test_takes_strides, True))


def test_op_is_registered_correctly() -> None:
    x, cos, sin = make(1, 4, 2, 6, torch.float32)
    torch.library.opcheck(torch.ops.workbench_kernels.rope.default, (x.requires_grad_(), cos, sin, True, True))


def test_refuses_heads_too_wide() -> None:
    x, cos, sin = make(1, 1, 1, 1026, torch.float32)
    with pytest.raises(ValueError, match="heads of up to 1024 numbers, not 1026"):
        rope(x, cos, sin, interleaved=True, impl="fused")
