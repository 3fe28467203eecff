"""Triton twin of `rms_norm`."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.rms_norm import MAX_ODD_WIDTH, MAX_WIDTH, fits_twin, width_step

MIN_BLOCK_D = 128  # narrower rows share this tile: fewer kernels to compile and prove
TILE = 1_024  # numbers of one program: some kernels with larger tiles spill with one Triton or another
MAX_PARTIALS = 512  # first-stage sums of the weight's gradient; fixed, so that every GPU adds in the same order


@dataclass(frozen=True)
class Launch:
    """The tile of one program."""

    block_m: int
    block_d: int
    num_warps: int


def launch_for(width: int) -> Launch:
    """The tile of forward and backward alike."""
    block_d = max(MIN_BLOCK_D, 1 << (width - 1).bit_length())
    return Launch(max(1, TILE // block_d), block_d, min(16, max(4, block_d // 256)))


@on_its_device
def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and 1/rms [M] in float32 of contiguous x [M, D]."""
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


@on_its_device
def forward_of_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the sum [M, D] and 1/rms [M] in float32 of contiguous x and residual [M, D]."""
    y, total, rstd = _forward(x, residual, weight, eps)
    assert total is not None
    return y, total, rstd


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    _check(x)
    num_rows, width = x.shape
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        launch = chosen(launch_for(width), "rms_norm_fwd_kernel", x.device, width=width, bytes=x.itemsize)
        rms_norm_fwd_kernel[(cdiv(num_rows, launch.block_m),)](
            x, residual, weight, y, total, rstd, num_rows, eps, residual is not None, width,
            launch.block_m, launch.block_d,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return y, total, rstd


@on_its_device
def backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, further: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; grad, x and what is added to the former, `further`, are contiguous."""
    _check(x)
    num_rows, width = x.shape
    launch = chosen(launch_for(width), "rms_norm_bwd_kernel", x.device, width=width, bytes=x.itemsize)
    num_tiles = cdiv(num_rows, launch.block_m)
    tiles_per_program = cdiv(num_tiles, MAX_PARTIALS)
    num_programs = cdiv(num_tiles, tiles_per_program) if num_rows else 0
    grad_x = torch.empty_like(x)
    partial = x.new_empty(num_programs, width, dtype=torch.float32)
    if num_rows:
        rms_norm_bwd_kernel[(num_programs,)](
            grad, further, x, weight, rstd, grad_x, partial, num_rows, tiles_per_program, further is not None, width,
            launch.block_m, launch.block_d,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return grad_x, partial.sum(dim=0).to(weight.dtype)


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose, filled by its row and not quite filled."""
    tensors = {"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "rstd_ptr": "*fp32", "num_rows": "i32"}
    found = []
    block_d = MIN_BLOCK_D
    widths = []
    while block_d <= MAX_WIDTH:
        widths += [block_d - width_step(block_d), block_d]
        block_d *= 2
    for width in widths:
        for kernel, launch, arguments, of_sum in (
            (rms_norm_fwd_kernel, launch_for(width), {"y_ptr": f"*{kind}", "eps": "fp32"}, ("residual", "total")),
            (
                rms_norm_bwd_kernel,
                launch_for(width),
                {"grad_ptr": f"*{kind}", "grad_x_ptr": f"*{kind}", "partial_ptr": "*fp32", "tiles_per_program": "i32"},
                ("further",),
            ),
        ):
            tile = {"D": width, "BLOCK_M": launch.block_m, "BLOCK_D": launch.block_d}
            extra = [f"{name}_ptr" for name in of_sum]
            plain = tile | {"OF_SUM": False} | dict.fromkeys(extra)
            name = f"{kernel.__name__} D={width}"
            found.append(Case(name, kernel, tensors | arguments, plain, launch.num_warps))
            pointers = tensors | arguments | dict.fromkeys(extra, f"*{kind}")
            found.append(Case(f"{name} of a sum", kernel, pointers, tile | {"OF_SUM": True}, launch.num_warps))
    return found


def _check(x: Tensor) -> None:
    check_dtype(x.dtype)
    width = x.shape[1]
    if not fits_twin(width):
        raise ValueError(
            f"the fused rms_norm takes rows of up to {MAX_WIDTH} numbers, beyond {MAX_ODD_WIDTH} in multiples of 16, "
            f"not {width}"
        )


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, num_rows, eps,
    OF_SUM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < num_rows)[:, None] & (column < D)[None, :]  # [BLOCK_M, BLOCK_D]
    offset = row[:, None] * D + column[None, :]

    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if OF_SUM:
        total = x + tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)  # [BLOCK_M]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    normal = (x * rstd[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + offset, (normal * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit
def rms_norm_bwd_kernel(
    grad_ptr, further_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, num_rows, tiles_per_program,
    OF_SUM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    grad_weight = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    for tile in range(0, tiles_per_program):
        row = (program * tiles_per_program + tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        inside = (row < num_rows)[:, None] & (column < D)[None, :]  # [BLOCK_M, BLOCK_D]
        offset = row[:, None] * D + column[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]  # [BLOCK_M, 1]
        normal = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * rstd
        grad_weight += grad * normal
        # Read again for every tile, from the cache: held in registers it makes wide rows spill.
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)  # [BLOCK_D]
        grad_normal = grad * weight[None, :]
        along = tl.sum(grad_normal * normal, axis=1)[:, None] / D  # the part along x, which normalising removes
        grad_x = (grad_normal - normal * along) * rstd
        if OF_SUM:
            grad_x += tl.load(further_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)

    tl.store(partial_ptr + program * D + column, tl.sum(grad_weight, axis=0), mask=column < D)
