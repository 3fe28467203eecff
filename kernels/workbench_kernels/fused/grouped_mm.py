"""Triton twin of `grouped_mm`: a fixed number of programs walk over a map of tiles, expert by expert.

Letters: M rows sorted by expert, N and K as in BLAS, E experts. With an activation the weight has 2N rows: gate above
up.
"""

from dataclasses import astuple, dataclass, replace
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case
from workbench_kernels.fused.architecture import TRITON_BEFORE_3_8, architecture_of, precision_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.expert_tiles import tile_map
from workbench_kernels.fused.interpreter import check_dtype, interpreting
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.gated import SWIGLU, GatedActivation

FULL_ROWS = 64  # of an expert, from which on it fills a large tile
NARROWEST_GRAD = 128  # columns of a tile of a weight's gradient; products of narrower ones wait for each other
GROUP_M = 8  # tiles of rows that are computed one after the other against the same columns, for the cache
INTERPRETED_PROGRAMS = 4
WIDEST_TILE, MOST_AT_ONCE = 128 * 256, 4  # numbers of a tile that leaves no room; programs that share one


@dataclass(frozen=True)
class Launch:
    """The tile of one program and how it is computed."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By architecture and bytes of a number: the widest tile without spills, and within the shared memory.
LARGE = {
    ("sm_80", 2): Launch(128, 128, 32, 8, 4),
    ("sm_90", 2): Launch(128, 256, 64, 8, 3),
    ("sm_100", 2): Launch(128, 256, 64, 8, 3),
    ("gfx942", 2): Launch(128, 128, 32, 8, 2),
    ("sm_80", 4): Launch(64, 64, 16, 8, 3),
    ("sm_90", 4): Launch(64, 64, 32, 4, 3),
    ("sm_100", 4): Launch(64, 64, 16, 4, 2),
    ("gfx942", 4): Launch(64, 64, 32, 4, 2),
}
# Rows that do not begin at multiples of 16 bytes are loaded number by number, which takes a register for each mask.
UNALIGNED = dict.fromkeys(SHARED_LIMIT, Launch(32, 32, 16, 8, 2)) | {"gfx942": Launch(32, 16, 16, 4, 2)}


def launch_for(rows_per_expert: int, num_columns: int, width: int, itemsize: int, architecture: str) -> Launch:
    """The tile of a product: narrower where an expert has few rows, or the product few columns."""
    if num_columns * itemsize % 16 or width * itemsize % 16:
        return UNALIGNED[architecture]
    large = LARGE[architecture, itemsize]
    block_n = large.block_n
    while block_n > 64 and block_n >= 2 * num_columns:
        block_n //= 2
    if rows_per_expert >= FULL_ROWS:
        return replace(large, block_n=block_n)
    # A step of decoding: all time goes into reading weights.
    return Launch(16, min(block_n, 128), large.block_k, 4, large.num_stages)


def gated_columns(block_n: int) -> int:
    """Columns of a tile that makes two products: their sums take as much room as those of one with `block_n`."""
    if block_n < 128:
        return block_n
    return block_n // 2 if TRITON_BEFORE_3_8 else 64


def _chosen(kernel: str, shape: tuple[int, int, int, int], device: torch.device, **form: int) -> Launch:
    """What was measured for about as many rows, or the picker's tile."""
    rows, columns, width, itemsize = shape
    picked = launch_for(*shape, architecture_of(device))
    about = 1 << rows.bit_length()
    return chosen(picked, kernel, device, rows_below=about, columns=columns, width=width, bytes=itemsize, **form)


class Product(NamedTuple):
    """What a fused product makes: the rows, and the gate and up products if they were asked for."""

    out: Tensor
    gate_up: Tensor | None


@on_its_device
def forward(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    gather_div: int = 1,
    scatter: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: GatedActivation | None = None,
    keep: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Product:
    """[M, N] of x [X, K] and weight [E, N, K] (or [E, 2N, K]), dense in either order of its last two axes.

    Row m of the product reads row `gather[m] // gather_div` of x (M = len(gather)) and is written to row `scatter[m]`.
    `row_scale` [M] multiplies it after bias and activation. `keep`: the gate and up products as well, [M, 2N], in the
    order of the experts. Rows that no expert owns are zero.
    """
    check_dtype(x.dtype)
    offs = offs.contiguous()
    bias, gather, scatter, row_scale = (
        None if part is None else part.contiguous() for part in (bias, gather, scatter, row_scale)
    )
    num_rows = len(x) if gather is None else len(gather)
    num_experts, num_columns, width = weight.shape
    num_columns = num_columns if activation is None else num_columns // 2
    turned = not weight.is_contiguous()
    weight = weight.transpose(1, 2).contiguous() if turned else weight
    architecture = architecture_of(x.device)
    shape = num_rows // num_experts, num_columns, width, x.dtype.itemsize
    tile = _chosen("grouped_mm_fwd_kernel", shape, x.device, gated=int(activation is not None), turned=int(turned))
    block_n = tile.block_n if activation is None else gated_columns(tile.block_n)
    out = x.new_empty(num_rows, num_columns, dtype=out_dtype or x.dtype)
    gate_up = x.new_empty(num_rows, 2 * num_columns) if keep else None
    if out.numel() == 0:
        return Product(out, gate_up)
    tiles = tile_map(offs, num_rows, tile.block_m)
    clamp = activation or SWIGLU
    grouped_mm_fwd_kernel[(_programs(x.device, tile, len(tiles) * cdiv(num_columns, block_n)),)](
        x.contiguous(), weight, bias, gather, scatter, row_scale, offs, tiles, out, gate_up, num_rows, len(tiles),
        clamp.limit, clamp.alpha, clamp.offset,
        num_experts, num_columns, width, gather_div, turned, activation is not None,
        precision_of(x.itemsize, architecture), tile.block_m, block_n, tile.block_k, GROUP_M,
        num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return Product(out, gate_up)


@on_its_device
def weight_grad(
    grad: Tensor,
    x: Tensor,
    offs: Tensor,
    *,
    grad_gather: Tensor | None = None,
    x_gather: Tensor | None = None,
    gather_div: int = 1,
    with_bias: bool = False,
    bias_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`grad[rows of e].T @ x[rows of e]`, [E, N, K], and `with_bias` the sum of the rows of `grad`, [E, N].

    Row m of either is row `gather[m] // gather_div` of the tensor where a gather is given; `bias_scale` [M] multiplies
    the rows in that sum alone.
    """
    check_dtype(x.dtype)
    offs = offs.contiguous()
    num_rows = next(len(rows) for rows in (grad_gather, x_gather, grad) if rows is not None)
    num_experts, num_columns, width = len(offs), grad.shape[1], x.shape[1]
    out = x.new_empty(num_experts, num_columns, width)
    if width == 0 and num_columns > 0 and with_bias:  # the sums are those beside any product, which is thrown away
        gathers = {"grad_gather": grad_gather, "x_gather": grad_gather, "gather_div": gather_div}
        return out, weight_grad(grad, grad, offs, **gathers, with_bias=True, bias_scale=bias_scale)[1]
    bias = x.new_empty(num_experts, num_columns) if with_bias else None
    if out.numel():
        architecture = architecture_of(x.device)
        columns = width if width * x.itemsize % 16 else max(width, NARROWEST_GRAD)
        shape = FULL_ROWS, columns, num_columns, x.dtype.itemsize
        tile = _chosen("grouped_mm_bwd_weight_kernel", shape, x.device)
        grid = (cdiv(num_columns, tile.block_m) * cdiv(width, tile.block_n), num_experts)
        grouped_mm_bwd_weight_kernel[grid](
            grad.contiguous(), x.contiguous(), grad_gather, x_gather, bias_scale, offs, out, bias, num_rows,
            num_columns, width, gather_div, precision_of(x.itemsize, architecture),
            tile.block_m, tile.block_n, tile.block_k,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out, bias


def _programs(device: torch.device, tile: Launch, num_tiles: int) -> int:
    """As many as run at once: the widest tile fills a multiprocessor, and narrower ones share it."""
    if interpreting():
        return min(INTERPRETED_PROGRAMS, num_tiles)
    at_once = min(MOST_AT_ONCE, max(1, WIDEST_TILE // (tile.block_m * tile.block_n)))
    return min(at_once * torch.cuda.get_device_properties(device).multi_processor_count, num_tiles)


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose: alone, with all options, of a turned weight, and for its gradient."""
    itemsize = 4 if kind == "fp32" else 2
    found = []
    for architecture in SHARED_LIMIT:
        tiles = {launch_for(rows, n, 2048, itemsize, architecture) for rows in (1, FULL_ROWS) for n in (64, 128, 256)}
        of_weights = {launch_for(FULL_ROWS, n, 2048, itemsize, architecture) for n in (NARROWEST_GRAD, 256)}
        for tile in sorted(tiles, key=astuple):
            found += [_forward_case(kind, architecture, tile, form) for form in ("alone", "all options", "turned")]
        for tile in sorted(of_weights, key=astuple):
            found += [_weight_case(kind, architecture, tile, fused) for fused in (False, True)]
        found += [
            _forward_case(kind, architecture, UNALIGNED[architecture], form, odd=True)
            for form in ("alone", "all options")
        ]
        found.append(_weight_case(kind, architecture, UNALIGNED[architecture], fused=True, odd=True))
    return found


def _precision(kind: str, architecture: str) -> str:
    return precision_of(4 if kind == "fp32" else 2, architecture)


def _matrix(kind: str, tile: Launch) -> Literal["wide", "narrow"] | None:
    if kind == "fp32":
        return None
    return "wide" if tile.block_m >= 64 else "narrow"


def _forward_case(kind: str, architecture: str, tile: Launch, form: str, *, odd: bool = False) -> Case:
    gated, turned = form == "all options", form == "turned"
    block_n = gated_columns(tile.block_n) if gated else tile.block_n
    arguments = {"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "out_ptr": f"*{kind}"}
    arguments |= {"offs_ptr": "*i32", "tiles_ptr": "*i32", "num_rows": "i32", "num_tiles": "i32"}
    arguments |= dict.fromkeys(("limit", "alpha", "raised"), "fp32")
    optional = {"bias_ptr": f"*{kind}", "gather_ptr": "*i32", "scatter_ptr": "*i32", "scale_ptr": "*fp32"}
    optional |= {"gate_up_ptr": f"*{kind}"}
    constants = {"E": 64, "N": 1024 - odd, "K": 2048 - odd, "GATHER_DIV": 8, "TURNED": turned, "GATED": gated}
    constants |= {"PRECISION": _precision(kind, architecture), "GROUP_M": GROUP_M}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": block_n, "BLOCK_K": tile.block_k}
    if gated:
        arguments |= optional
    else:
        constants |= dict.fromkeys(optional)
    name = f"grouped_mm_fwd_kernel {form}{' odd' * odd} {architecture}"
    return Case(
        *(name, grouped_mm_fwd_kernel, arguments, constants, tile.num_warps, tile.num_stages),
        *(_matrix(kind, tile), (architecture,)),
    )


def _weight_case(kind: str, architecture: str, tile: Launch, fused: bool, *, odd: bool = False) -> Case:
    arguments = {"grad_ptr": f"*{kind}", "x_ptr": f"*{kind}", "offs_ptr": "*i32", "out_ptr": f"*{kind}"}
    arguments["num_rows"] = "i32"
    constants = {"N": 1024 - odd, "K": 2048 - odd, "GATHER_DIV": 8, "PRECISION": _precision(kind, architecture)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    optional = {"grad_gather_ptr": "*i32", "x_gather_ptr": "*i32", "scale_ptr": "*fp32", "bias_ptr": f"*{kind}"}
    if fused:
        arguments |= optional
    else:
        constants |= dict.fromkeys(optional)
    name = f"grouped_mm_bwd_weight_kernel{' gathered' * fused}{' odd' * odd} {architecture}"
    return Case(
        *(name, grouped_mm_bwd_weight_kernel, arguments, constants),
        *(tile.num_warps, tile.num_stages, _matrix(kind, tile), (architecture,)),
    )


@triton.jit
def grouped_mm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, gather_ptr, scatter_ptr, scale_ptr, offs_ptr, tiles_ptr, out_ptr, gate_up_ptr,
    num_rows, num_tiles, limit, alpha, raised,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GATHER_DIV: tl.constexpr, TURNED: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(N, BLOCK_N)
    rows_of_weight: tl.constexpr = 2 * N if GATED else N
    for work in range(tl.program_id(0), num_tiles * column_tiles, tl.num_programs(0)):
        # Down the rows of some tiles before the next columns: neighbours in time share x and weight.
        group = work // (GROUP_M * column_tiles)
        rows_of_group = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
        within = work % (GROUP_M * column_tiles)
        packed = tl.load(tiles_ptr + group * GROUP_M + within % rows_of_group)
        if packed >= 0:
            expert = (packed & 0xFFFF).to(tl.int64)  # E: rows that none owns
            start = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
            end = tl.minimum(tl.load(offs_ptr + expert, mask=expert < E, other=num_rows), num_rows)
            row = start.to(tl.int64) + (packed >> 16).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            known = row < end
            column = (within // rows_of_group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            there = column < N
            source = row
            if gather_ptr is not None:
                source = tl.load(gather_ptr + row, mask=known & (expert < E), other=0).to(tl.int64) // GATHER_DIV
            weights = weight_ptr + tl.minimum(expert, E - 1) * (rows_of_weight * K)
            depth = tl.where(expert < E, K, 0)

            gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for first in range(0, depth, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                inside = k < K
                x = tl.load(
                    x_ptr + source[:, None] * K + k[None, :], mask=known[:, None] & inside[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_K]
                if TURNED:
                    place = weights + k[:, None] * rows_of_weight + column[None, :]  # [BLOCK_K, BLOCK_N]
                else:
                    place = weights + column[None, :] * K + k[:, None]
                mask = inside[:, None] & there[None, :]
                gate = tl.dot(x, tl.load(place, mask=mask, other=0.0), gate, input_precision=PRECISION)
                if GATED:
                    below: tl.constexpr = N if TURNED else N * K
                    up = tl.dot(x, tl.load(place + below, mask=mask, other=0.0), up, input_precision=PRECISION)

            stored = known[:, None] & there[None, :]
            if bias_ptr is not None:
                owned = there & (expert < E)
                biases = bias_ptr + expert * rows_of_weight + column
                gate += tl.load(biases, mask=owned, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    up += tl.load(biases + N, mask=owned, other=0.0).to(tl.float32)[None, :]
            out = gate
            if GATED:
                dtype = x_ptr.dtype.element_ty
                gate = gate.to(dtype)
                up = up.to(dtype)
                if gate_up_ptr is not None:
                    kept = gate_up_ptr + row[:, None] * (2 * N) + column[None, :]
                    tl.store(kept, gate, mask=stored)
                    tl.store(kept + N, up, mask=stored)
                gate = gate.to(tl.float32)
                up = up.to(tl.float32)
                # Chosen and not a minimum, which on a GPU passes over what is no number.
                gate = tl.where(gate > limit, limit, gate)
                up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + raised
                out = gate * tl.sigmoid(alpha * gate) * up
            if scale_ptr is not None:
                out = out * tl.load(scale_ptr + row, mask=known & (expert < E), other=0.0).to(tl.float32)[:, None]
            target = row
            if scatter_ptr is not None:
                target = tl.load(scatter_ptr + row, mask=known, other=0).to(tl.int64)
            tl.store(out_ptr + target[:, None] * N + column[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def grouped_mm_bwd_weight_kernel(
    grad_ptr, x_ptr, grad_gather_ptr, x_gather_ptr, scale_ptr, offs_ptr, out_ptr, bias_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, GATHER_DIV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M of N, BLOCK_N of K] of one expert; BLOCK_K of its rows at a time."""
    expert = tl.program_id(1).to(tl.int64)
    tiles_of_k = tl.cdiv(K, BLOCK_N)
    n = (tl.program_id(0) // tiles_of_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = (tl.program_id(0) % tiles_of_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    start = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.minimum(tl.load(offs_ptr + expert), num_rows)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    column_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        row = tl.arange(0, BLOCK_K).to(tl.int64) + first  # [BLOCK_K]
        known = row < end
        grad_row = row
        if grad_gather_ptr is not None:
            grad_row = tl.load(grad_gather_ptr + row, mask=known, other=0).to(tl.int64) // GATHER_DIV
        x_row = row
        if x_gather_ptr is not None:
            x_row = tl.load(x_gather_ptr + row, mask=known, other=0).to(tl.int64) // GATHER_DIV
        grad = tl.load(
            grad_ptr + grad_row[None, :] * N + n[:, None], mask=known[None, :] & (n < N)[:, None], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + x_row[:, None] * K + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(grad, x, total, input_precision=PRECISION)
        if bias_ptr is not None:
            weighted = grad.to(tl.float32)
            if scale_ptr is not None:
                weighted *= tl.load(scale_ptr + row, mask=known, other=0.0).to(tl.float32)[None, :]
            column_sum += tl.sum(weighted, axis=1)
    place = out_ptr + expert * (N * K) + n[:, None] * K + k[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
    if bias_ptr is not None and tl.program_id(0) % tiles_of_k == 0:
        tl.store(bias_ptr + expert * N + n, column_sum.to(bias_ptr.dtype.element_ty), mask=n < N)
