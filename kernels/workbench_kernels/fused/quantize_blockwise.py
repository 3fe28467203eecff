"""Triton twin of `quantize_blockwise`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.architecture import architecture_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype, interpreting
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.quantize_blockwise import FP8, LARGEST, LARGEST_POWER, SMALLEST_SCALE, WIDTH

VECTOR = 16  # rows of other widths are filled up to a multiple: of these each number would be one load
ROUNDS_TO_E4M3 = ("sm_90", "sm_100")  # in hardware; elsewhere, and in the interpreter, the kernel does it in integers


@dataclass(frozen=True)
class Launch:
    """The tile of one program: rows of one block of columns."""

    block_m: int
    num_warps: int


def launch_for(block_rows: int) -> Launch:
    return Launch(32, 4) if block_rows == 1 else Launch(block_rows, 8)


@on_its_device
def forward(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return values [M, K] and scale [M / block_rows, K / 128], rounded up, of contiguous x [M, K]."""
    check_dtype(x.dtype)
    num_rows, width = x.shape
    if missing := -width % VECTOR:
        values, scale = forward(F.pad(x, (0, missing)), block_rows, power_of_two)
        return values[:, :width].contiguous(), scale
    num_blocks = cdiv(width, WIDTH)
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = x.new_empty(cdiv(num_rows, block_rows), num_blocks, dtype=torch.float32)
    if x.numel():
        launch = chosen(
            launch_for(block_rows), "quantize_blockwise_fwd_kernel", x.device, block_rows=block_rows, width=width
        )
        native = architecture_of(x.device) in ROUNDS_TO_E4M3 and not interpreting()
        quantize_blockwise_fwd_kernel[(cdiv(num_rows, launch.block_m), num_blocks)](
            x, values if native else values.view(torch.uint8), scale, num_rows,
            block_rows, power_of_two, width, launch.block_m, WIDTH, LARGEST, SMALLEST_SCALE, LARGEST_POWER,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return values, scale


def cases(kind: str) -> list[Case]:
    """Both blocks and both formats of scales, of whole blocks and with a short one at the end of a row."""
    found = []
    for rows in (1, WIDTH):
        for power_of_two in (False, True):
            for width in (512, 496):
                launch = launch_for(rows)
                constants = {"ROWS": rows, "POWER_OF_TWO": power_of_two, "K": width}
                constants |= {"BLOCK_M": launch.block_m, "BLOCK_K": WIDTH}
                constants |= {"LARGEST": LARGEST, "SMALLEST_SCALE": SMALLEST_SCALE, "LARGEST_POWER": LARGEST_POWER}
                scales = "powers of two" if power_of_two else "float32"
                for targets, values in ((ROUNDS_TO_E4M3, "*fp8e4nv"), (("sm_80", "gfx942"), "*u8")):
                    name = f"quantize_blockwise_fwd_kernel K={width}, blocks of {rows} x {WIDTH}, {scales}"
                    name += "" if targets == ROUNDS_TO_E4M3 else ", in integers"
                    arguments = {"x_ptr": f"*{kind}", "values_ptr": values, "scale_ptr": "*fp32", "num_rows": "i32"}
                    kernel = quantize_blockwise_fwd_kernel
                    found.append(Case(name, kernel, arguments, constants, launch.num_warps, architectures=targets))
    return found


@triton.jit
def quantize_blockwise_fwd_kernel(
    x_ptr, values_ptr, scale_ptr, num_rows,
    ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, LARGEST_POWER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    block = tl.program_id(1).to(tl.int64)
    column = block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    inside = (row < num_rows)[:, None] & (column < K)[None, :]  # [BLOCK_M, BLOCK_K]
    offset = row[:, None] * K + column[None, :]

    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
    # The maximum passes over NaN, which the scale must not.
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)  # [BLOCK_M]
    if ROWS > 1:
        largest = tl.max(largest, axis=0) + tl.zeros([BLOCK_M], dtype=tl.float32)
    # The plain quotient of a GPU may be off by its last bit.
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST_SCALE)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.minimum(bits.to(tl.float32, bitcast=True), LARGEST_POWER)
    scale = tl.where(largest == float("inf"), float("nan"), scale)
    divided = tl.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK_M, BLOCK_K]))

    dtype = values_ptr.dtype.element_ty
    rounded = encoded(divided) if dtype == tl.uint8 else divided.to(dtype)  # both saturate
    tl.store(values_ptr + offset, rounded, mask=inside)
    num_blocks = (K + BLOCK_K - 1) // BLOCK_K
    scale_offset = row // ROWS * num_blocks + block
    tl.store(scale_ptr + scale_offset, scale, mask=(row < num_rows) & (row % ROWS == 0))


@triton.jit
def encoded(x):
    """The bits of the E4M3 number nearest to a float32 number, ties to even; beyond 448 it saturates."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Twenty bits of the mantissa go, and the exponent's bias of 127 becomes 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, and that is the last bit of a float32 number near 2^14.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, small, normal), 0x7E)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
