"""The Triton twin of quantize_blockwise; see tests/test_kernels_twins.py."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, uninitialized_memory_is_nan
from torch import Tensor

import workbench_kernels.fused.quantize_blockwise
from workbench_kernels import Quantized, quantize_blockwise
from workbench_kernels.quantize_blockwise import BLOCKS, FP8, ScaleFormat

FORMATS: list[ScaleFormat] = ["float32", "power_of_two"]
# The interpreter rounds in integers as sm_80 does, a GPU in its hardware too.
ARCHITECTURES = [None] if INTERPRETED else [None, "sm_80"]
LARGE = [] if INTERPRETED else [(20_000, 7168)]
MUTATIONS = [
    Mutation("quantize_blockwise_fwd_kernel", "+ 0x7FFFFF)", "+ 0x3FFFFF)"),
    Mutation("quantize_blockwise_fwd_kernel", "row // ROWS * num_blocks", "row // ROWS * (num_blocks - 1)"),
    Mutation("quantize_blockwise_fwd_kernel", "tl.max(largest, axis=0)", "tl.min(largest, axis=0)"),
    Mutation("quantize_blockwise_fwd_kernel", "(column < K)[None, :]", "(column < K - 1)[None, :]"),
    Mutation("quantize_blockwise_fwd_kernel", 'tl.where(x == x, tl.abs(x), float("inf"))', "tl.abs(x)"),
    Mutation("encoded", "+ ((magnitude >> 20) & 1)", "+ 1"),
    Mutation("encoded", "magnitude < 0x3C800000", "magnitude < 0x3C000000"),
    Mutation("encoded", "(bits >> 24) & 0x80", "0"),
]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    if request.param is not None:
        twin = workbench_kernels.fused.quantize_blockwise
        monkeypatch.setattr(twin, "architecture_of", lambda device: request.param)
    return request.param


def make(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers of which many columns are far smaller than others, and some zeros."""
    torch.manual_seed(0)
    x = torch.randn(rows, width) * torch.logspace(-3, 3, max(1, width))[:width]
    return x.masked_fill(torch.rand(rows, width) < 0.1, 0).to(DEVICE, dtype)


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert found.values.dtype == expected.values.dtype == FP8 and found.values.is_contiguous()
    # The reciprocals of 0 and -0 differ.
    torch.testing.assert_close(1 / found.values.float(), 1 / expected.values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


def assert_is_the_definition(x: Tensor, block: tuple[int, int], scale_format: ScaleFormat) -> None:
    expected = quantize_blockwise(x, block=block, scale_format=scale_format, impl="reference")
    for _ in range(2):
        with uninitialized_memory_is_nan():
            assert_same(quantize_blockwise(x, block=block, scale_format=scale_format, impl="fused"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (60, 129), (129, 60), (130, 272), *LARGE])
@pytest.mark.usefixtures("architecture")
def test_is_the_definition_bit_for_bit(
    shape: tuple[int, int], block: tuple[int, int], scale_format: ScaleFormat, dtype: torch.dtype
) -> None:
    assert_is_the_definition(make(*shape, dtype), block, scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.usefixtures("architecture")
def test_rounds_as_torch_does_at_every_tie(scale_format: ScaleFormat) -> None:
    """Every E4M3 number, all that lie half-way between two, and the next floats to either side, with scale 1."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    ties = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(-math.inf))
    rows = torch.nn.functional.pad(torch.stack((numbers[1:], ties, up, down)), (0, 2), value=448.0)
    x = torch.cat((rows, -rows)).to(DEVICE)
    assert_is_the_definition(x, BLOCKS[0], scale_format)
    assert (quantize_blockwise(x, impl="fused").scale == 1).all()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("architecture")
def test_edges_of_float32(block: tuple[int, int], scale_format: ScaleFormat) -> None:
    """In a block of its own each: the largest and the smallest numbers, infinities, NaN."""
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(2, 9 * 128)
    for index, number in enumerate((largest, -3.35e38, 1e-45, -1e-40, 1.2e-38, math.inf, -math.inf, math.nan)):
        x[0, index * 128 : index * 128 + 2] = torch.tensor([1.0 if abs(number) > 1 else 0.0, number])
    assert_is_the_definition(x.to(DEVICE), block, scale_format)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    proofs = {
        "tl.abs(x)": partial(test_edges_of_float32, BLOCKS[0], "float32"),
        "+ 1": partial(test_rounds_as_torch_does_at_every_tie, "float32"),
        "tl.min(largest, axis=0)": partial(test_is_the_definition_bit_for_bit, (60, 129), BLOCKS[1], "float32",
                                           torch.float32),
    }  # fmt: skip
    usual = partial(test_is_the_definition_bit_for_bit, (60, 176), BLOCKS[0], "power_of_two", torch.float32)
    assert_seen("quantize_blockwise", mutation, tmp_path, proofs.get(mutation.wrong, usual))


@pytest.mark.parametrize("rows", [1, 128])
def test_op_is_registered_correctly(rows: int) -> None:
    x = make(5, 130, torch.float32)
    torch.library.opcheck(torch.ops.workbench_kernels.quantize_blockwise.default, (x, rows, True, True))


def test_compiles_as_one_graph() -> None:
    x = make(5, 130, torch.float32)
    fused = partial(quantize_blockwise, impl="fused")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(Quantized(*compiled(x)), fused(x))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        *([(torch.bfloat16, "rounds bfloat16 wrongly")] if INTERPRETED else []),
        (torch.float64, "takes float32, float16 or bfloat16"),
    ],
)
def test_refuses(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(make(2, 5, dtype), impl="fused")
