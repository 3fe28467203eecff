"""rope on the CPU: the rule, cases by hand, views that begin anywhere, what it refuses. The twin is interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_rules import assert_obeys_rule, results, turned
from torch import Tensor

from workbench_kernels import rope
from workbench_kernels.rope import fits_twin, reference
from workbench_kernels.tier import resolve

LAYOUTS = [True, False]


def make(
    width: int, dtype: torch.dtype, *, batch: int = 2, positions: int = 5, heads: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    angles = 7 * torch.randn(positions, width // 2, dtype=torch.float64)
    return torch.randn(batch, positions, heads, width).to(dtype), angles.cos().to(wide), angles.sin().to(wide)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [0, 2, 6, 64, 130])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 129, 3), (3, 60, 1), (0, 4, 2), (2, 0, 2)])
def test_obeys_the_rule(sizes: tuple[int, int, int], width: int, dtype: torch.dtype, interleaved: bool) -> None:
    batch, positions, heads = sizes
    x, cos, sin = make(width, dtype, batch=batch, positions=positions, heads=heads)
    assert_obeys_rule(turned(rope, interleaved, cos, sin), turned(reference, interleaved, cos, sin), [x])


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_views_may_begin_anywhere(offset: int, length: int, interleaved: bool) -> None:
    x, cos, sin = make(9, torch.float32)
    view = x[:1, :length, :1, offset : offset + 6]
    cos, sin = cos[:length, :3], sin[:length, :3]
    expected = reference(view, cos, sin, interleaved=interleaved)
    before = x.clone()
    torch.testing.assert_close(rope(view, cos, sin, interleaved=interleaved), expected, rtol=1e-6, atol=1e-6)
    swapped = x.transpose(1, 2)[..., offset : offset + 6]
    turn = torch.cat((cos, cos))[:3], torch.cat((sin, sin))[:3]
    if length > 1:
        expected = reference(swapped, *turn, interleaved=interleaved)
        torch.testing.assert_close(rope(swapped, *turn, interleaved=interleaved), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


def test_angles_take_no_gradient_in_any_tier() -> None:
    x, cos, sin = make(6, torch.float32)
    for impl in ("auto", "reference"):
        rope(x.requires_grad_(), cos.requires_grad_(), sin, interleaved=True, impl=impl).sum().backward()
        assert x.grad is not None and cos.grad is None
        x.grad = None


def test_a_quarter_turn_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # the first pair by 90 degrees
    assert rope(x, cos, sin, interleaved=True).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]
    assert rope(x, cos, sin, interleaved=False).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_the_way_back_has_the_other_sign(interleaved: bool) -> None:
    x, cos, sin = make(10, torch.float64)
    there = rope(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(rope(there, cos, -sin, interleaved=interleaved), x)


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_gradients_by_finite_differences(interleaved: bool) -> None:
    x, cos, sin = make(6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin, interleaved=interleaved), x.requires_grad_())


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_is_registered_correctly(dtype: torch.dtype, interleaved: bool) -> None:
    x, cos, sin = make(6, dtype)
    torch.library.opcheck(torch.ops.workbench_kernels.rope.default, (x.requires_grad_(), cos, sin, interleaved, False))
    swapped = make(6, dtype, positions=3, heads=5)[0].transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.workbench_kernels.rope.default, (swapped, cos, sin, interleaved, False))


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_compiles_as_one_graph(interleaved: bool) -> None:
    x, cos, sin = make(6, torch.float32)
    op = turned(rope, interleaved, cos, sin)
    grad = torch.randn_like(x)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, [x], grad), results(op, [x], grad), rtol=0, atol=0)


X, COS = torch.ones(1, 2, 3, 4), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x must be \[B, T, H, R\]"),
        ({"x": torch.ones(1, 2, 3, 5)}, "with R even"),
        ({"cos": torch.ones(2, 3)}, r"cos and sin must be \[T, R / 2\]"),
        ({"sin": torch.ones(1, 2)}, r"cos and sin must be \[T, R / 2\]"),
        ({"x": X.long()}, "must be floating"),
        ({"sin": COS.double()}, "the last two alike"),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(**{"x": X, "cos": COS, "sin": COS, "interleaved": True, **change})


def test_auto_on_a_gpu_takes_the_definition_for_heads_without_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    for width, tier in ((1024, "fused"), (1026, "reference")):
        assert resolve("rope", "auto", torch.device("cuda"), torch.bfloat16, fits=fits_twin(width)) == tier
