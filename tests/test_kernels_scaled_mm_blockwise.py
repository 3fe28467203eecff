"""scaled_mm_blockwise on the CPU: the rule, a case by hand, NaN that stays where it is. The twin is interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rules import assert_exact, uninitialized_memory_is_nan
from torch import Tensor

from workbench_kernels import quantize_blockwise, scaled_mm_blockwise
from workbench_kernels.quantize_blockwise import FP8, WIDTH, ScaleFormat
from workbench_kernels.scaled_mm_blockwise import reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make(m: int, n: int, k: int, scale_format: ScaleFormat = "float32") -> Inputs:
    torch.manual_seed(0)
    a, scale_a = quantize_blockwise(torch.randn(m, k) * torch.rand(m, 1).exp2(), scale_format=scale_format)
    b, scale_b = quantize_blockwise(torch.randn(n, k), block=(WIDTH, WIDTH), scale_format=scale_format)
    return a, b, scale_a, scale_b


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (60, 129, 60), (129, 60, 129), (129, 300, 257), (1, 129, 1024), (0, 5, 3), (5, 0, 3), (5, 3, 0)],
)
@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_obeys_the_rule(sizes: tuple[int, int, int], out_dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    inputs = make(*sizes, scale_format)
    found = scaled_mm_blockwise(*inputs, out_dtype=out_dtype)
    with uninitialized_memory_is_nan():
        assert torch.equal(scaled_mm_blockwise(*inputs, out_dtype=out_dtype), found)
    assert found.shape == sizes[:2] and found.dtype == out_dtype
    assert_exact("output", found, reference(*inputs, out_dtype), reference(*inputs, torch.float64))


def test_each_block_has_its_scale() -> None:
    """Ones times ones count the columns of a block: 128, 128 and 44."""
    a, b = torch.ones(3, 300).to(FP8), torch.ones(200, 300).to(FP8)
    scale_a, scale_b = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[1.0, 10, 100], [0, 1, 0]])
    for impl in ("auto", "reference"):
        found = scaled_mm_blockwise(a, b, scale_a, scale_b, out_dtype=torch.float32, impl=impl)
        assert found[:, 0].tolist() == [128 + 2560 + 13200, 512 + 6400 + 26400, 896 + 10240 + 39600]
        assert found[:, 127].tolist() == found[:, 0].tolist()
        assert found[:, 128].tolist() == found[:, 199].tolist() == [256, 640, 1024]


def test_what_is_multiplied_is_what_was_rounded() -> None:
    """The product is that of the matrices before they were rounded, up to a sixteenth of each number."""
    torch.manual_seed(0)
    x, weight = torch.rand(40, 300), torch.rand(150, 300)
    a, scale_a = quantize_blockwise(x)
    b, scale_b = quantize_blockwise(weight, block=(WIDTH, WIDTH))
    torch.testing.assert_close(scaled_mm_blockwise(a, b, scale_a, scale_b).float(), x @ weight.T, rtol=0.02, atol=0)


def test_nan_stays_in_its_row() -> None:
    a, b, scale_a, scale_b = make(5, 140, 200)
    expected = scaled_mm_blockwise(a, b, scale_a, scale_b)
    a[2, 199] = math.nan
    scale_a[4, 1] = math.nan
    found = scaled_mm_blockwise(a, b, scale_a, scale_b)
    assert found[[2, 4]].isnan().all() and torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_takes_any_strides() -> None:
    a, b, scale_a, scale_b = make(129, 140, 200)
    strided = [torch.cat((x.float(), x.float()), dim=1).to(x.dtype)[:, : x.shape[1]] for x in (a, b)]
    turned = [scale.T.contiguous().T for scale in (scale_a, scale_b)]
    assert torch.equal(scaled_mm_blockwise(*strided, *turned), scaled_mm_blockwise(a, b, scale_a, scale_b))


def test_no_gradient_reaches_any_argument() -> None:
    a, b, scale_a, scale_b = make(3, 4, 5)
    for impl in ("auto", "reference"):
        found = scaled_mm_blockwise(a, b, scale_a.requires_grad_(), scale_b.requires_grad_(), impl=impl)
        assert not found.requires_grad


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_op_is_registered_correctly(out_dtype: torch.dtype) -> None:
    inputs = make(5, 130, 140)
    op, arguments = torch.ops.workbench_kernels.scaled_mm_blockwise.default, (*inputs, out_dtype, False)
    # Its test of the schema multiplies the arguments, which torch cannot do in FP8: that they stay is seen below.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=checks)
    for tensor, before in zip(inputs, make(5, 130, 140), strict=True):
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))


def test_compiles_as_one_graph() -> None:
    inputs = make(5, 130, 140)
    compiled = torch.compile(scaled_mm_blockwise, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), scaled_mm_blockwise(*inputs))


A, B, SCALE_A, SCALE_B = make(3, 130, 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": A[0]}, r"a \[200\] must be \[M, K\]"),
        ({"b": B[:, :199]}, r"b \[130, 199\] \[N, K\]"),
        ({"a": A.float()}, r"a \(torch.float32\) and b"),
        ({"scale_a": SCALE_A[:, :1]}, r"scale_a \(torch.float32 \[3, 1\]\) must be torch.float32 \[3, 2\]"),
        ({"scale_b": SCALE_B[:1]}, r"scale_b \(torch.float32 \[1, 2\]\) must be torch.float32 \[2, 2\]"),
        ({"scale_b": SCALE_B.double()}, r"scale_b \(torch.float64"),
        ({"out_dtype": FP8}, "must be bfloat16, float16, float32 or float64"),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_mm_blockwise(**{"a": A, "b": B, "scale_a": SCALE_A, "scale_b": SCALE_B, **change})
