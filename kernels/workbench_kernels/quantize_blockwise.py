"""Round numbers to FP8, with one scale for every block of them.

Letters: M rows, K columns; P blocks of rows and Q of columns; R rows and C columns of a block.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import resolve, unwatched

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
WIDTH = 128  # columns of a block
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LARGEST_POWER = 2.0**119  # the largest power of two whose product with 448 float32 can hold
_CHUNK = 262_144  # numbers that the torch form rounds at a time, from the cache

ScaleFormat = Literal["float32", "power_of_two"]
BLOCKS = ((1, WIDTH), (WIDTH, WIDTH))


class Quantized(NamedTuple):
    """E4M3 numbers, and the float32 scale of every block that makes them the numbers that they were rounded from."""

    values: Tensor
    scale: Tensor


def quantize_blockwise(
    x: Tensor,
    *,
    block: tuple[int, int] = (1, WIDTH),
    scale_format: ScaleFormat = "float32",
    impl: str = "auto",
) -> Quantized:
    """`values * scale` is `x` rounded to E4M3; the scale of a block takes its largest magnitude to 448.

    A number is rounded to nearest, ties to even: off by at most a sixteenth of itself, or by 2^-10 scales where it is
    so small that E4M3 has no normal form for it. A scale is float32 even for float64, and at least 2^-126, which is the
    scale of zeros. A block that holds a NaN, an infinity or a number beyond float32 becomes NaN, its scale too.
    No gradient reaches `x`.

    Args:
        x: [..., K] for blocks of a row, [N, K] for blocks of 128 rows.
        block: (1, 128), as activations have it, or (128, 128), as weights do; the last block of a row or column may be
            short.
        scale_format: "float32", or "power_of_two" for the next power of two upwards, at most 2^119: beyond 448 * 2^119
            numbers saturate.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        A pair: values in float8_e4m3fn in the shape of `x`, and scale in float32, [..., ceil(K / 128)] for blocks of a
        row, [ceil(N / 128), ceil(K / 128)] for blocks of 128 rows.

    Raises:
        ValueError: shape or dtype does not fit, or block or scale_format is none of these.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; powers of two as in OCP Microscaling Formats (E8M0), 2023.
    """
    if block not in BLOCKS:
        raise ValueError(f"block={block} must be (1, 128) or (128, 128)")
    if scale_format not in ("float32", "power_of_two"):
        raise ValueError(f"scale_format={scale_format!r} must be 'float32' or 'power_of_two'")
    if x.ndim == 0 or (block[0] > 1 and x.ndim != 2):
        raise ValueError(f"x {list(x.shape)} must be {'[..., K]' if block[0] == 1 else '[N, K]'} for block={block}")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x ({x.dtype}) must be float64, float32, float16 or bfloat16")
    rows_MK, power_of_two = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1]), scale_format == "power_of_two"
    tier = resolve("quantize_blockwise", impl, x.device, x.dtype)
    if tier == "reference":
        values_MK, scale_PQ = reference(rows_MK, block[0], power_of_two)
    elif tier == "torch" and unwatched(rows_MK):
        values_MK, scale_PQ = forward(rows_MK, block[0], power_of_two)
    else:
        values_MK, scale_PQ = _quantize_blockwise(rows_MK, block[0], power_of_two, tier == "fused")
    scale = scale_PQ.view(*x.shape[:-1], scale_PQ.shape[1]) if block[0] == 1 else scale_PQ
    return Quantized(values_MK.view(x.shape), scale)


def reference(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The definition, of x [M, K]."""
    blocks_PRQC = in_blocks(x.to(torch.promote_types(x.dtype, torch.float32)), block_rows)
    scale_PQ = scale_of(blocks_PRQC.abs().amax((1, 3)), power_of_two)
    values_PRQC = (blocks_PRQC / scale_PQ[:, None, :, None]).clamp(-LARGEST, LARGEST).to(FP8)
    return values_PRQC.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous(), scale_PQ


def dequantize(values: Tensor, scale: Tensor, *, block_rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `quantize_blockwise` rounded to; the definition."""
    scale = scale.to(dtype).repeat_interleave(WIDTH, dim=-1)[..., : values.shape[-1]]
    if block_rows > 1:
        scale = scale.repeat_interleave(block_rows, dim=0)[: values.shape[0]]
    return values.to(dtype) * scale


def forward(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The fast torch form: the same numbers, a few rows of x [M, K] at a time and no magnitude written."""
    values_MK, scale_PQ = _empty(x, block_rows)
    blocks = max(1, _CHUNK // (block_rows * max(1, x.shape[1])))
    parts = (tensor.split(blocks * block_rows) for tensor in (x, values_MK))
    for part_MK, rounded_MK, part_PQ in zip(*parts, scale_PQ.split(blocks), strict=True):
        blocks_PRQC = in_blocks(part_MK.to(torch.promote_types(x.dtype, torch.float32)), block_rows)
        part_PQ.copy_(scale_of(torch.maximum(blocks_PRQC.amax((1, 3)), -blocks_PRQC.amin((1, 3))), power_of_two))
        divided_PRQC = (blocks_PRQC / part_PQ[:, None, :, None]).clamp_(-LARGEST, LARGEST)
        rounded_MK.copy_(divided_PRQC.flatten(2).flatten(0, 1)[: part_MK.shape[0], : part_MK.shape[1]])
    return values_MK, scale_PQ


def in_blocks(x: Tensor, block_rows: int) -> Tensor:
    """[P, R, Q, C] of x [M, K], filled up with zeros."""
    filled_MK = F.pad(x, (0, -x.shape[1] % WIDTH, 0, -x.shape[0] % block_rows))
    return filled_MK.view(filled_MK.shape[0] // block_rows, block_rows, filled_MK.shape[1] // WIDTH, WIDTH)


def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """The float32 scale of blocks whose largest magnitudes these are."""
    # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
    scale = (largest / torch.full((), LARGEST, dtype=largest.dtype, device=largest.device)).to(torch.float32)
    finite = scale.isfinite()
    scale = scale.clamp(min=SMALLEST_SCALE)
    if power_of_two:
        # A mantissa that is not zero carries into the exponent.
        bits = (scale.view(torch.int32) + 0x7FFFFF).bitwise_and_(0x7F800000)
        scale = bits.view(torch.float32).clamp(max=LARGEST_POWER)
    return scale.masked_fill(~finite, math.nan)


def _empty(x: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Room for what x [M, K] becomes."""
    num_blocks = -(-x.shape[0] // block_rows), -(-x.shape[1] // WIDTH)
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(num_blocks, dtype=torch.float32)


@torch.library.custom_op("workbench_kernels::quantize_blockwise", mutates_args=())
def _quantize_blockwise(x: Tensor, block_rows: int, power_of_two: bool, fused: bool) -> tuple[Tensor, Tensor]:
    if not fused:
        return forward(x, block_rows, power_of_two)
    from workbench_kernels.fused import quantize_blockwise as twin

    return twin.forward(x.contiguous(), block_rows, power_of_two)


@_quantize_blockwise.register_fake
def _(x: Tensor, block_rows: int, power_of_two: bool, fused: bool) -> tuple[Tensor, Tensor]:
    return _empty(x, block_rows)
