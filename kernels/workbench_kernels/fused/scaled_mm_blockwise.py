"""Triton twin of `scaled_mm_blockwise`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case
from workbench_kernels.fused.architecture import MULTIPLIES_E4M3, architecture_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.quantize_blockwise import VECTOR
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.quantize_blockwise import FP8, WIDTH

GROUP_M = 8  # tiles of rows that neighbouring programs share columns of b in: both stay in the L2 cache


@dataclass(frozen=True)
class Launch:
    """The tile of one program, and how many blocks of columns are on their way at once."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By the rows of a tile. One product is of 128 columns, as a scale is, or of fewer where decoding takes registers.
_NATIVE = (
    Launch(16, 64, 128, 4, 4),
    Launch(32, 64, 128, 4, 4),
    Launch(64, 128, 128, 4, 4),
    Launch(128, 128, 128, 8, 4),
)
LAUNCHES = {
    "sm_80": (
        Launch(16, 64, 64, 4, 4),
        Launch(32, 64, 64, 4, 3),
        Launch(64, 128, 64, 8, 3),
        Launch(128, 128, 32, 8, 4),
    ),
    "sm_90": _NATIVE,
    "sm_100": _NATIVE,
    "gfx942": (
        Launch(16, 64, 64, 4, 2),
        Launch(32, 64, 64, 4, 2),
        Launch(64, 128, 64, 8, 2),
        Launch(128, 128, 64, 8, 2),
    ),
}


def launch_for(num_rows: int, architecture: str) -> Launch:
    """The smallest tile that holds all rows, or the largest: where rows are few, b is read once, by more programs."""
    return next((launch for launch in LAUNCHES[architecture] if num_rows <= launch.block_m), LAUNCHES[architecture][-1])


@on_its_device
def forward(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return a [M, K] times b [N, K], of any strides, with scale_a [M, K / 128] and scale_b [N / 128, K / 128]."""
    check_dtype(out_dtype)
    num_rows, num_columns = a.shape[0], b.shape[0]
    if 0 in (num_rows, num_columns, a.shape[1]):
        return torch.zeros(num_rows, num_columns, dtype=out_dtype, device=a.device)
    # Rows of whole vectors, the last columns zeros: to store one number at a time takes registers, and spills.
    out = torch.empty(num_rows, num_columns + -num_columns % VECTOR, dtype=out_dtype, device=a.device)
    architecture = architecture_of(a.device)
    launch = chosen(
        launch_for(num_rows, architecture), "scaled_mm_blockwise_fwd_kernel", a.device,
        rows_below=1 << num_rows.bit_length(), columns=num_columns, width=a.shape[1],
    )  # fmt: skip
    a, b = (_readable(tensor) for tensor in (a, b))
    if architecture in MULTIPLIES_E4M3:
        a, b = (tensor.view(FP8) for tensor in (a, b))
    num_programs = cdiv(num_rows, launch.block_m) * cdiv(num_columns, launch.block_n)
    scaled_mm_blockwise_fwd_kernel[(num_programs,)](
        a, b, scale_a.contiguous(), scale_b.contiguous(), out, num_rows, num_columns, out.shape[1], a.shape[1],
        launch.block_m, launch.block_n, launch.block_k, WIDTH, GROUP_M,
        num_warps=launch.num_warps, num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out[:, :num_columns].contiguous()


def _readable(values: Tensor) -> Tensor:
    """The bytes of E4M3 values in rows of whole vectors, filled up with zeros: of others each number is one load."""
    bytes_MK = values.contiguous().view(torch.uint8)
    missing = -values.shape[1] % VECTOR
    return F.pad(bytes_MK, (0, missing)) if missing else bytes_MK


def cases(kind: str) -> list[Case]:
    """Every tile, of rows of whole blocks in whole vectors and of others."""
    found = []
    for architecture in SHARED_LIMIT:
        values = "*fp8e4nv" if architecture in MULTIPLIES_E4M3 else "*u8"
        tensors = {"a_ptr": values, "b_ptr": values, "scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32"}
        arguments = tensors | {"out_ptr": f"*{kind}", "num_rows": "i32"}
        for launch in LAUNCHES[architecture]:
            tile = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
            for num_columns, width in ((576, 1024), (575, 1008)):
                sizes = {"N": num_columns, "OUT_WIDTH": 576, "K": width}
                found.append(
                    Case(
                        f"scaled_mm_blockwise_fwd_kernel N={num_columns} K={width}",
                        scaled_mm_blockwise_fwd_kernel,
                        arguments,
                        sizes | tile | {"WIDTH": WIDTH, "GROUP_M": GROUP_M},
                        launch.num_warps,
                        launch.num_stages,
                        "wide" if launch.block_m >= 64 else "narrow",
                        (architecture,),
                    )
                )
    return found


@triton.jit
def scaled_mm_blockwise_fwd_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, out_ptr, num_rows,
    N: tl.constexpr, OUT_WIDTH: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Down a few tiles of rows, then on to the next columns.
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + program % (GROUP_M * tiles_n) % group
    tile_n = program % (GROUP_M * tiles_n) // group

    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_inside, column_inside = row < num_rows, column < N
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    a_tile_ptr = a_ptr + row[:, None] * K + k[None, :]
    b_tile_ptr = b_ptr + column[:, None] * K + k[None, :]
    num_blocks = (K + WIDTH - 1) // WIDTH
    scale_a_row_ptr = scale_a_ptr + row * num_blocks
    scale_b_row_ptr = scale_b_ptr + tile_n.to(tl.int64) * BLOCK_N // WIDTH * num_blocks  # a tile lies in one block

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a_inside, b_inside = row_inside[:, None], column_inside[:, None]
        if K % BLOCK_K != 0:
            k_inside = (k < K - start)[None, :]
            a_inside, b_inside = a_inside & k_inside, b_inside & k_inside
        a = tl.load(a_tile_ptr + start, mask=a_inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_tile_ptr + start, mask=b_inside, other=0.0)  # [BLOCK_N, BLOCK_K]
        scale_a = tl.load(scale_a_row_ptr + start // WIDTH, mask=row_inside, other=0.0)  # [BLOCK_M]
        scale_b = tl.load(scale_b_row_ptr + start // WIDTH)
        if a_ptr.dtype.element_ty == tl.uint8:
            a, b = decoded(a), decoded(b)
        # A sum of its own for every block: the matrix units of sm_90 would keep 14 bits of one sum over all of them.
        total += tl.dot(a, b.T) * (scale_a * scale_b)[:, None]

    out = out_ptr + row[:, None] * OUT_WIDTH + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & (column < OUT_WIDTH)[None, :])


@triton.jit
def decoded(code):
    """The float16 numbers that the bits of E4M3 numbers stand for, exactly."""
    magnitude = code & 0x7F
    bits = ((code & 0x80).to(tl.int16) << 8) | (magnitude.to(tl.int16) << 7)
    number = bits.to(tl.float16, bitcast=True) * 256.0  # the exponent's bias is 7 there and 15 here
    return tl.where(magnitude == 0x7F, float("nan"), number)
