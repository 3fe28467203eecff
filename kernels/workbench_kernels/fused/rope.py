"""Triton twin of `rope`; the way back is the same kernel with `-sin`."""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.rope import MAX_WIDTH, fits_twin

MIN_BLOCK_P = 16  # narrower heads share this tile
TILE = 512  # pairs of one program: some kernels with larger tiles spill


@dataclass(frozen=True)
class Launch:
    """The tile of one program: heads of tokens, and pairs of a head."""

    block_m: int
    block_p: int
    num_warps: int = 4


def launch_for(width: int) -> Launch:
    block_p = max(MIN_BLOCK_P, 1 << (width // 2 - 1).bit_length())
    return Launch(TILE // block_p, block_p)


@on_its_device
def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn x [B, T, H, R], of any strides but the last, which is 1 after a copy where need be."""
    check_dtype(x.dtype)
    if not fits_twin(x.shape[-1]):
        raise ValueError(f"the fused rope takes heads of up to {MAX_WIDTH} numbers, not {x.shape[-1]}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = (part.to(torch.float32).contiguous() for part in (cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = x.shape[0] * x.shape[1] * x.shape[2]
    if num_rows:
        tile = chosen(launch_for(x.shape[3]), "rope_fwd_kernel", x.device, width=x.shape[3], bytes=x.itemsize)
        rope_fwd_kernel[(cdiv(num_rows, tile.block_m),)](
            x, cos, sin, out, num_rows, x.shape[1], x.shape[2], x.stride(0), x.stride(1), x.stride(2),
            x.shape[3] // 2, interleaved, tile.block_m, tile.block_p,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out


def cases(kind: str) -> list[Case]:
    """Every tile that the launcher chooses, filled and not quite filled, in both layouts."""
    tensors = {"x_ptr": f"*{kind}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{kind}"}
    sizes = ("num_rows", "num_positions", "num_heads", "stride_b", "stride_t", "stride_h")
    found, block_p = [], MIN_BLOCK_P
    while block_p <= MAX_WIDTH // 2:
        for pairs in (block_p - 1, block_p):
            for interleaved in (True, False):
                tile = launch_for(2 * pairs)
                constants = {"P": pairs, "INTERLEAVED": interleaved, "BLOCK_M": tile.block_m, "BLOCK_P": tile.block_p}
                name = f"rope_fwd_kernel R={2 * pairs} {'interleaved' if interleaved else 'halves'}"
                arguments = tensors | dict.fromkeys(sizes, "i32")
                found.append(Case(name, rope_fwd_kernel, arguments, constants, tile.num_warps))
        block_p *= 2
    far = replace(found[-1], name=f"{found[-1].name}, far strides", arguments=tensors | dict.fromkeys(sizes, "i64"))
    return [*found, far]


@triton.jit
def rope_fwd_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, num_positions, num_heads, stride_b, stride_t, stride_h,
    P: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], a head of a token
    pair = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = (row < num_rows)[:, None] & (pair < P)[None, :]  # [BLOCK_M, BLOCK_P]
    token = row // num_heads
    position = token % num_positions
    start = (token // num_positions) * stride_b + position * stride_t + (row % num_heads) * stride_h
    first_column = 2 * pair if INTERLEAVED else pair
    second_column = first_column + 1 if INTERLEAVED else first_column + P

    first = tl.load(x_ptr + start[:, None] + first_column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + start[:, None] + second_column[None, :], mask=inside, other=0.0).to(tl.float32)
    angle = position[:, None] * P + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_P]
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    out = out_ptr + row[:, None] * (2 * P)
    dtype = out_ptr.dtype.element_ty
    tl.store(out + first_column[None, :], (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out + second_column[None, :], (second * cos + first * sin).to(dtype), mask=inside)
