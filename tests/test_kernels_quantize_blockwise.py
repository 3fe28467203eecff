"""quantize_blockwise on the CPU: its numbers one by one, edges of float32, what it refuses. The twin is interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rules import ODD_SIZES, uninitialized_memory_is_nan
from torch import Tensor

from workbench_kernels import Quantized, quantize_blockwise
from workbench_kernels.quantize_blockwise import (
    BLOCKS,
    FP8,
    LARGEST_POWER,
    SMALLEST_SCALE,
    WIDTH,
    ScaleFormat,
    dequantize,
)

FORMATS: list[ScaleFormat] = ["float32", "power_of_two"]
LARGEST_FLOAT = torch.finfo(torch.float32).max
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which many columns are far smaller than others, and some zeros."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 3, max(1, shape[-1]))[: shape[-1]]
    return x.masked_fill(torch.rand(shape) < 0.1, 0).to(dtype)


def assert_same(found: Quantized, expected: Quantized) -> None:
    """The same bits, where NaN has several."""
    assert found.values.dtype == expected.values.dtype == FP8 and found.values.is_contiguous()
    # The reciprocals of 0 and -0 differ.
    torch.testing.assert_close(1 / found.values.float(), 1 / expected.values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


def by_hand(x: Tensor, rows: int, power_of_two: bool) -> Quantized:
    """One block after the other, with the scale's exponent by `math`."""
    values, scales = torch.zeros(x.shape, dtype=FP8), torch.zeros(-(-x.shape[0] // rows), -(-x.shape[1] // WIDTH))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * WIDTH, (j + 1) * WIDTH)
            scale = torch.tensor(max(float(x[part].abs().max() / 448), 2.0**-126))
            if power_of_two:
                mantissa, exponent = math.frexp(float(scale))
                scale = torch.tensor(2.0 ** (exponent - (mantissa == 0.5)))
            scales[i, j] = scale
            values[part] = (x[part] / scale).to(FP8)
    return Quantized(values, scales)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", ODD_SIZES)
@pytest.mark.parametrize("width", [*ODD_SIZES, 256])
def test_is_the_formula_of_each_block(rows: int, width: int, block: tuple[int, int], scale_format: ScaleFormat) -> None:
    x = make(rows, width)
    found = quantize_blockwise(x, block=block, scale_format=scale_format)
    assert_same(found, by_hand(x, block[0], scale_format == "power_of_two"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (60, 129), (1300, 257)])
def test_is_the_definition(
    shape: tuple[int, int], block: tuple[int, int], scale_format: ScaleFormat, dtype: torch.dtype
) -> None:
    x = make(*shape, dtype=dtype)
    expected = quantize_blockwise(x, block=block, scale_format=scale_format, impl="reference")
    assert_same(quantize_blockwise(x, block=block, scale_format=scale_format), expected)
    with uninitialized_memory_is_nan():
        assert_same(quantize_blockwise(x, block=block, scale_format=scale_format), expected)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [1e-41, 1e-38, 1e-30, 1.0, 1e30])
def test_no_number_is_further_off_than_e4m3_allows(
    size: float, block: tuple[int, int], scale_format: ScaleFormat
) -> None:
    x = make(130, 300).mul(size).to(torch.float32)
    values, scale = quantize_blockwise(x, block=block, scale_format=scale_format)
    step = dequantize(torch.ones_like(x).to(FP8), scale, block_rows=block[0])
    error = (dequantize(values, scale, block_rows=block[0]).double() - x.double()).abs()
    # The product of value and scale rounds too, by 2^-150 where it is subnormal.
    assert (error <= torch.maximum(x.double().abs() / 16, step.double() * 2**-10) * (1 + 2**-20) + 2**-149).all()


def test_every_e4m3_number_is_itself_and_ties_go_to_even() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    assert quantize_blockwise(numbers).scale.item() == 1
    assert torch.equal(quantize_blockwise(numbers).values.float(), numbers)
    between = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, numbers[:-1], numbers[1:])
    found = quantize_blockwise(torch.cat((between, torch.tensor([-448.0]))))
    assert found.scale.item() == 1 and torch.equal(found.values.float()[:-1], even)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (449.0, 2.0), (447.0, 1.0), (224.0, 0.5), (1e-45, 2.0**-126), (0.0, 2.0**-126)],
)
def test_powers_of_two_go_up(largest: float, scale: float) -> None:
    found = quantize_blockwise(torch.tensor([largest]), scale_format="power_of_two")
    assert found.scale.tolist() == [scale]
    assert abs(found.values.float().item() * scale - largest) <= max(largest / 16, scale * 2**-10)


def test_zeros_have_a_scale_and_the_largest_float_stays_finite() -> None:
    for scale_format in FORMATS:
        zeros = quantize_blockwise(torch.zeros(2, 130), scale_format=scale_format)
        assert (zeros.values.float() == 0).all() and (zeros.scale == SMALLEST_SCALE).all()
        for number in (LARGEST_FLOAT, -LARGEST_FLOAT, 3.35e38):
            values, scale = quantize_blockwise(torch.tensor([number, 1.0]), scale_format=scale_format)
            assert (scale * 448).isfinite().all() and dequantize(values, scale).isfinite().all()
            assert values.float()[0] == math.copysign(448, number)
    assert scale.item() == LARGEST_POWER


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_float32_makes_nan_of_its_block_and_no_other(
    number: float, scale_format: ScaleFormat, impl: str
) -> None:
    x = make(3, 300, dtype=torch.float64 if number == 1e300 else torch.float32)
    expected = quantize_blockwise(x, scale_format=scale_format, impl=impl)
    values, scale = quantize_blockwise(x.index_put((torch.tensor(1), torch.tensor(140)), x.new_tensor(number)),
                                       scale_format=scale_format, impl=impl)  # fmt: skip
    assert scale[1, 1].isnan() and values[1, 128:256].float().isnan().all()
    expected.scale[1, 1] = math.nan
    expected.values[1, 128:256] = math.nan
    assert_same(Quantized(values, scale), expected)


def test_takes_any_shape_of_rows_and_any_strides() -> None:
    x = make(6, 200)
    for shape in ((2, 3, 200), (200, 6), (1, 6, 1, 200)):
        view = x.T if shape == (200, 6) else x.view(shape)
        values, scale = quantize_blockwise(view)
        assert values.shape == view.shape and scale.shape == (*view.shape[:-1], -(-view.shape[-1] // WIDTH))
        assert_same(Quantized(values, scale), quantize_blockwise(view.contiguous()))
    assert torch.equal(quantize_blockwise(x[0]).scale, quantize_blockwise(x).scale[0])
    hidden = torch.full((8, 300), math.nan)
    hidden[1:7, 50:250] = x
    for block in BLOCKS:
        assert_same(quantize_blockwise(hidden[1:7, 50:250], block=block), quantize_blockwise(x, block=block))


def test_no_gradient_reaches_x() -> None:
    for impl in ("auto", "reference"):
        values, scale = quantize_blockwise(make(2, 5).requires_grad_(), impl=impl)
        assert not values.requires_grad and not scale.requires_grad


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_is_registered_correctly(dtype: torch.dtype, rows: int) -> None:
    x = make(5, 130, dtype=dtype)
    torch.library.opcheck(torch.ops.workbench_kernels.quantize_blockwise.default, (x, rows, True, False))
    torch.library.opcheck(torch.ops.workbench_kernels.quantize_blockwise.default, (x.T, rows, False, False))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(quantize_blockwise, backend="aot_eager", fullgraph=True)
    for block in BLOCKS:
        x = make(5, 130).requires_grad_()
        assert_same(Quantized(*compiled(x, block=block)), quantize_blockwise(x, block=block))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (128, 1)}, r"block=\(128, 1\) must be \(1, 128\) or \(128, 128\)"),
        ({"scale_format": "e8m0"}, "scale_format='e8m0' must be"),
        ({"x": torch.tensor(1.0)}, r"must be \[..., K\]"),
        ({"x": torch.ones(2, 3, 4), "block": (128, 128)}, r"must be \[N, K\]"),
        ({"x": torch.ones(2, 3).to(FP8)}, "must be float64, float32, float16 or bfloat16"),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(**{"x": torch.ones(2, 3), **change})
