"""Triton twin of `mla_attention`: scores of a tile at a time, forward and again in backward.

Letters: B sequences, T queries, S keys, H heads; K, R and U widths of a head, filled up with zeros to those of a tile.
A constant `X_T` is the step from one position to the next in `x`, `X_H` that from one head to the next. Logits are to
the base 2, for which GPUs have an instruction.

Backward is two passes that recompute the weights, one for keys and values and one for queries: no sum is shared between
programs, so none depends on their order.
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, merged
from workbench_kernels.fused.architecture import TRITON_BEFORE_3_8, architecture_of, precision_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype, interpreting
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.mla_attention import MAX_WIDTHS, fits_twin, most_for

LOG2_E = math.log2(math.e)
PREPROCESS_TILE = 4_096  # numbers of one program
# Widths K, R and U of the tiles. Narrower heads are filled up to the first that holds them: few kernels are to prove.
WIDTHS = ((32, 16, 32), (64, 32, 64), (128, 64, 128), MAX_WIDTHS)
# By architecture and bytes of a number, for each of WIDTHS: rows and block of forward, of keys and values, of queries.
# Larger ones spill, or ask for more shared memory than there is; tf32x3 keeps three parts of every number.
_FLOAT32 = (((32, 16),) * 3, ((16, 32),) * 3, ((16, 16),) * 3)
TILES = {
    ("sm_80", 2): (
        ((128, 64), (128, 32), (128, 64)),
        ((128, 64), (128, 32), (128, 32)),
        ((128, 64), (32, 64), (32, 64)),
        ((64, 32), (32, 32), (32, 32)),
    ),
    ("sm_90", 2): (
        ((128, 64), (128, 64), (128, 64)),
        ((128, 64), (128, 64), (128, 64)),
        ((128, 64), (128, 32), (128, 64)),
        ((128, 32), (32, 32), (128, 32 if TRITON_BEFORE_3_8 else 16)),
    ),
    ("sm_100", 2): (
        ((128, 128), (128, 64), (128, 64)),
        ((128, 64), (128, 64), (128, 64)),
        ((128, 64), (64, 64), (128, 64)),
        ((64, 64), (64, 32), (64, 32)),
    ),
    ("gfx942", 2): (((128, 32), (64, 32), (64, 32)),) * 3 + (((64, 32), (64, 16), (64, 32)),),
    ("sm_80", 4): _FLOAT32,
    ("sm_90", 4): _FLOAT32,
    ("sm_100", 4): _FLOAT32,
    ("gfx942", 4): (((64, 32), (64, 16), (64, 32)),) * 2
    + (((64, 32), (64, 16), (64, 32 if TRITON_BEFORE_3_8 else 16)),),
}
HEADS = 16  # of the cases that are compiled ahead of time


@dataclass(frozen=True)
class Launch:
    """The tile of one program: the rows it owns, and those it passes over a block at a time."""

    rows: int
    block: int
    num_warps: int
    num_stages: int


KERNELS = ("mla_attention_fwd_kernel", "mla_attention_bwd_key_value_kernel", "mla_attention_bwd_query_kernel")


class Launches(NamedTuple):
    forward: Launch
    key_value: Launch
    query: Launch


def widths_for(key_width: int, rope_width: int, value_width: int) -> tuple[int, int, int]:
    """The narrowest tile that holds heads of these widths."""
    given = (key_width, rope_width, value_width)
    return next(held for held in WIDTHS if all(width <= most for width, most in zip(given, held, strict=True)))


def launches_for(widths: tuple[int, int, int], architecture: str, element_bytes: int) -> Launches:
    num_warps = 4 if architecture == "gfx942" or (element_bytes == 4 and widths[0] < 64) else 8
    num_stages = 1 if architecture == "gfx942" else 2
    if (architecture, element_bytes) == ("sm_90", 2):
        num_stages = 3  # with two, a block is waited for before the products of the one before are begun
    forward, key_value, query = (
        Launch(rows, block, num_warps, num_stages)
        for rows, block in TILES[architecture, element_bytes][WIDTHS.index(widths)]
    )
    if widths == MAX_WIDTHS:  # or it would ask for more shared memory than there is
        query = replace(query, num_stages=min(2, num_stages))
    if widths == WIDTHS[1] or not TRITON_BEFORE_3_8:  # or some Triton spills
        key_value = replace(key_value, num_stages=min(2, num_stages))
    return Launches(forward, key_value, query)


class Operands(NamedTuple):
    """The inputs as the kernels read them, and which keys each query sees."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q_nope, q_rope, k_nope, k_rope, value
    oldest: Tensor  # [S] int32, the first key that a query at this position sees
    stop: Tensor  # [S] int32, the end of the positions whose queries see the key at this one
    length: Tensor  # [1] int32, positions that a document owns
    constants: dict[str, int | str]
    launches: Launches


@on_its_device
def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, H, U] and, in float32 [B, H, T], the log to the base 2 of each softmax's sum."""
    (num_sequences, num_queries, num_heads, _), num_keys = q_nope.shape, k_nope.shape[1]
    read = _operands(q_nope, q_rope, k_nope, k_rope, value, cu_seqlens, window)
    tile = read.launches.forward
    out = value.new_empty(num_sequences, num_queries, num_heads, read.tensors[-1].shape[3])
    lse = value.new_empty(num_sequences, num_heads, num_queries, dtype=torch.float32)
    mla_attention_fwd_kernel[(num_sequences * num_heads * cdiv(num_queries, tile.rows),)](
        *read.tensors, _base_2(sinks, num_heads, value.device), read.oldest, read.length, out, lse,
        num_queries, num_keys, softmax_scale * LOG2_E, BLOCK_T=tile.rows, BLOCK_S=tile.block, **read.constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return _as_wide_as(value, out), lse


@on_its_device
def backward(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of all six in the order of `forward`; without sinks the last one is empty."""
    (num_sequences, num_queries, num_heads, _), num_keys = q_nope.shape, k_nope.shape[1]
    read = _operands(q_nope, q_rope, k_nope, k_rope, value, cu_seqlens, window)
    key_width, rope_width, value_width = (read.tensors[i].shape[3] for i in (0, 1, 4))
    grad, out = (_filled(x, value_width).contiguous() for x in (grad, out))
    grad_q_nope = grad.new_empty(num_sequences, num_queries, num_heads, key_width)
    grad_q_rope = grad.new_empty(num_sequences, num_queries, num_heads, rope_width)
    grad_k_nope = grad.new_empty(num_sequences, num_keys, num_heads, key_width)
    grad_k_rope = grad.new_empty(num_sequences, num_heads, num_keys, rope_width, dtype=torch.float32)
    grad_value = grad.new_empty(num_sequences, num_keys, num_heads, value_width)
    delta, num_rows = torch.empty_like(lse), lse.numel()
    sizes = softmax_scale, num_queries, num_keys, softmax_scale * LOG2_E
    rows = PREPROCESS_TILE // value_width
    mla_attention_bwd_preprocess_kernel[(cdiv(num_rows, rows),)](
        grad, out, delta, num_queries, num_rows, num_heads, rows, value_width,
        num_warps=4,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    tile = read.launches.query
    mla_attention_bwd_query_kernel[(num_sequences * num_heads * cdiv(num_queries, tile.rows),)](
        grad, *read.tensors, read.oldest, read.length, lse, delta, grad_q_nope, grad_q_rope, *sizes,
        BLOCK_T=tile.rows, BLOCK_S=tile.block, **read.constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    tile = read.launches.key_value
    mla_attention_bwd_key_value_kernel[(num_sequences * num_heads * cdiv(num_keys, tile.rows),)](
        grad, *read.tensors, read.oldest, read.stop, read.length, lse, delta,
        grad_k_nope, grad_k_rope, grad_value, *sizes,
        BLOCK_S=tile.rows, BLOCK_T=tile.block, **read.constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    if sinks is None:
        grad_sinks = value.new_empty(0)
    else:
        owned_T = torch.arange(num_queries, device=value.device) < read.length - (num_keys - num_queries)
        taken_BHT = torch.exp2(_base_2(sinks, num_heads, value.device)[:, None] - lse) * delta
        grad_sinks = taken_BHT.where(owned_T, 0).sum((0, 2)).neg().to(sinks.dtype)
    return (
        _as_wide_as(q_nope, grad_q_nope),
        _as_wide_as(q_rope, grad_q_rope),
        _as_wide_as(k_nope, grad_k_nope),
        _as_wide_as(k_rope, grad_k_rope.sum(1).to(k_rope.dtype)),
        _as_wide_as(value, grad_value),
        grad_sinks,
    )


def _operands(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> Operands:
    check_dtype(value.dtype)
    given = q_nope.shape[3], q_rope.shape[3], value.shape[3]
    if not fits_twin(*given, value.dtype):
        raise ValueError(
            f"the fused mla_attention takes heads of up to {most_for(value.dtype)} numbers (K, R and U) in "
            f"{value.dtype}, not {given}"
        )
    widths, architecture = widths_for(*given), architecture_of(value.device)
    key_width, rope_width, value_width = widths
    tensors = (
        _laid_out(q_nope, key_width),
        _laid_out(q_rope, rope_width),
        _laid_out(k_nope, key_width),
        _laid_out(k_rope.unsqueeze(2), rope_width),
        _laid_out(value, value_width),
    )
    steps = [(x.stride(1), x.stride(2)) for x in tensors]
    # The interpreter pays by the tile, and has room for large ones in every type.
    picked = launches_for(widths, architecture, 2 if interpreting() else value.itemsize)
    shape = dict(zip(("key", "rope", "value"), widths, strict=True)) | {"bytes": value.itemsize}
    shape |= {"queries_below": 1 << q_nope.shape[1].bit_length(), "window": window or 0}
    shape |= {"documents": int(cu_seqlens is not None)}
    return Operands(
        tensors,
        *_bounds(cu_seqlens, window, k_nope.shape[1], value.device),
        constants_for(precision_of(value.itemsize, architecture), q_nope.shape[2], widths, steps),
        Launches(
            *(chosen(launch, kernel, value.device, **shape) for launch, kernel in zip(picked, KERNELS, strict=True))
        ),
    )


def constants_for(
    precision: str, num_heads: int, widths: tuple[int, int, int], steps: list[tuple[int, int]]
) -> dict[str, int | str]:
    """What the three large kernels have in common; `steps` from position to position and head to head, by tensor."""
    found: dict[str, int | str] = {"H": num_heads}
    for name, (of_position, of_head) in zip(("Q_NOPE", "Q_ROPE", "K_NOPE", "K_ROPE", "VALUE"), steps, strict=True):
        found |= {f"{name}_T": of_position} | ({} if name == "K_ROPE" else {f"{name}_H": of_head})
    return found | {"PRECISION": precision} | dict(zip(("BLOCK_K", "BLOCK_R", "BLOCK_U"), widths, strict=True))


def _laid_out(x: Tensor, width: int) -> Tensor:
    """[B, S, H, width] as the kernels read it, a copy only where it lies otherwise or is narrower.

    The heads of a position lie within its row, the rows of all sequences at one step, and all begin at whole 16 bytes:
    what a projection has split off does too. The steps are constants of the kernels, so they may not grow with S.
    """
    if x.shape[3] < width:
        return _filled(x, width).contiguous()
    whole = 16 // x.element_size()
    lies_so = (
        x.stride(3) == 1
        and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
        and x.stride(1) >= x.shape[2] * x.stride(2)
        and x.stride(1) % whole == x.stride(2) % whole == 0
        and x.data_ptr() % 16 == 0
    )
    return x if lies_so else x.clone(memory_format=torch.contiguous_format)


def _filled(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _as_wide_as(like: Tensor, x: Tensor) -> Tensor:
    return x[..., : like.shape[-1]].contiguous()


def _base_2(sinks: Tensor | None, num_heads: int, device: torch.device) -> Tensor:
    """[H] float32; minus infinity takes no weight."""
    if sinks is None:
        return torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=device)
    return sinks.to(torch.float32) * LOG2_E


def _bounds(
    cu_seqlens: Tensor | None, window: int | None, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`Operands.oldest`, `stop` and `length`, computed where `cu_seqlens` lies: nothing waits for it.

    The first two never decrease, so that those of a tile's first and last row hold for the tile.
    """
    position_S = torch.arange(num_keys, dtype=torch.int32, device=device)
    if cu_seqlens is None:
        oldest_S, stop_S = torch.zeros_like(position_S), torch.full_like(position_S, num_keys)
        length = torch.full((1,), num_keys, dtype=torch.int32, device=device)
    else:
        length = cu_seqlens[-1:].clamp(max=num_keys)
        document_S = torch.searchsorted(cu_seqlens.contiguous(), position_S, right=True).clamp(max=len(cu_seqlens) - 1)
        # A query that no document owns sees nothing.
        oldest_S = cu_seqlens[document_S - 1].where(position_S < length, num_keys)
        stop_S = cu_seqlens[document_S]
    if window is not None and window < num_keys:
        oldest_S, stop_S = oldest_S.maximum(position_S - (window - 1)), stop_S.minimum(position_S + window)
    return oldest_S, stop_S, length


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose, each once for all architectures that share it."""
    element_bytes = 4 if kind == "fp32" else 2
    found: list[Case] = []
    for widths in WIDTHS[: len(TILES["sm_90", element_bytes])]:
        found.append(_preprocess_case(kind, widths[2]))
        key_width, rope_width, value_width = widths
        steps = [(HEADS * width, width) for width in (key_width, rope_width, key_width, rope_width, value_width)]
        steps[3] = (rope_width, rope_width)
        kernels = mla_attention_fwd_kernel, mla_attention_bwd_key_value_kernel, mla_attention_bwd_query_kernel
        for (index, kernel), architecture in product(enumerate(kernels), SHARED_LIMIT):
            launch = launches_for(widths, architecture, element_bytes)[index]
            rows, block = ("BLOCK_S", "BLOCK_T") if index == 1 else ("BLOCK_T", "BLOCK_S")
            constants = {rows: launch.rows, block: launch.block}
            constants |= constants_for(precision_of(element_bytes, architecture), HEADS, widths, steps)
            found.append(
                Case(
                    f"{kernel.__name__} K={key_width} R={rope_width} U={value_width}",
                    kernel,
                    {name: _type_of(name, kind) for name in kernel.arg_names if name not in constants},
                    constants,
                    launch.num_warps,
                    launch.num_stages,
                    "narrow" if kind == "fp32" or launch.rows < 64 else "wide",
                    (architecture,),
                )
            )
    return merged(found)


def _preprocess_case(kind: str, value_width: int) -> Case:
    kernel = mla_attention_bwd_preprocess_kernel
    constants = {"H": HEADS, "BLOCK_M": PREPROCESS_TILE // value_width, "BLOCK_U": value_width}
    arguments = {name: _type_of(name, kind) for name in kernel.arg_names if name not in constants}
    return Case(f"{kernel.__name__} U={value_width}", kernel, arguments, constants, num_warps=4)


def _type_of(argument: str, kind: str) -> str:
    if argument in ("oldest_ptr", "stop_ptr", "length_ptr"):
        return "*i32"
    if argument in ("sinks_ptr", "lse_ptr", "delta_ptr", "grad_k_rope_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{kind}"
    return "fp32" if argument.startswith("scale") else "i32"


@triton.jit
def _rows(base_ptr, first, end, STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head from `first` on, zeros at and beyond `end`; [ROWS, WIDTH]."""
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    # The way to the first row may need 64 bits, that from there on does not.
    first_ptr = base_ptr + tl.full([], STEP, tl.int64) * first
    return tl.load(first_ptr + row * STEP + tl.arange(0, WIDTH)[None, :], mask=first + row < end, other=0.0)


@triton.jit
def _put_rows(base_ptr, tile, first, end, STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    first_ptr = base_ptr + tl.full([], STEP, tl.int64) * first
    value = tile.to(base_ptr.dtype.element_ty)
    tl.store(first_ptr + row * STEP + tl.arange(0, WIDTH)[None, :], value, mask=first + row < end)


@triton.jit
def mla_attention_fwd_kernel(
    q_nope_ptr, q_rope_ptr, k_nope_ptr, k_rope_ptr, value_ptr, sinks_ptr, oldest_ptr, length_ptr, out_ptr, lse_ptr,
    num_queries, num_keys, scale_log2,
    H: tl.constexpr, Q_NOPE_T: tl.constexpr, Q_NOPE_H: tl.constexpr, Q_ROPE_T: tl.constexpr, Q_ROPE_H: tl.constexpr,
    K_NOPE_T: tl.constexpr, K_NOPE_H: tl.constexpr, K_ROPE_T: tl.constexpr,
    VALUE_T: tl.constexpr, VALUE_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_queries, BLOCK_T)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)  # a head of a sequence
    sequence, head = row // H, row % H
    # The last queries see the most keys, so their programs come first.
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_T
    past = num_keys - num_queries
    length = tl.load(length_ptr)
    end = length - past  # of the queries, as `length` is of the keys
    query = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    oldest = tl.load(oldest_ptr + past + query, mask=query < num_queries, other=num_keys)  # [BLOCK_T]
    q_nope_ptr += sequence * num_queries * Q_NOPE_T + head * Q_NOPE_H
    q_rope_ptr += sequence * num_queries * Q_ROPE_T + head * Q_ROPE_H
    k_nope_ptr += sequence * num_keys * K_NOPE_T + head * K_NOPE_H
    k_rope_ptr += sequence * num_keys * K_ROPE_T
    value_ptr += sequence * num_keys * VALUE_T + head * VALUE_H

    q_nope = _rows(q_nope_ptr, first, end, Q_NOPE_T, BLOCK_T, BLOCK_K)
    q_rope = _rows(q_rope_ptr, first, end, Q_ROPE_T, BLOCK_T, BLOCK_R)
    sink = tl.load(sinks_ptr + head)
    # Finite where nothing has been seen yet: no infinity is taken from another.
    largest = tl.full([BLOCK_T], -1e30, tl.float32)
    largest = tl.maximum(largest, sink)
    total = tl.exp2(sink - largest)
    mixed = tl.zeros([BLOCK_T, BLOCK_U], tl.float32)
    for start in range(tl.load(oldest_ptr + past + first), tl.minimum(past + first + BLOCK_T, length), BLOCK_S):
        k_nope = _rows(k_nope_ptr, start, length, K_NOPE_T, BLOCK_S, BLOCK_K)
        k_rope = _rows(k_rope_ptr, start, length, K_ROPE_T, BLOCK_S, BLOCK_R)
        value = _rows(value_ptr, start, length, VALUE_T, BLOCK_S, BLOCK_U)
        scores = tl.dot(q_nope, tl.trans(k_nope), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION) * scale_log2
        key = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        seen = (key[None, :] <= past + query[:, None]) & (key[None, :] >= oldest[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger

    total = tl.where(total > 0.0, total, 1.0)  # rows that no document owns
    out_ptr += (sequence * num_queries * H + head) * BLOCK_U
    _put_rows(out_ptr, mixed / total[:, None], first, num_queries, H * BLOCK_U, BLOCK_T, BLOCK_U)
    tl.store(lse_ptr + row * num_queries + query, largest + tl.log2(total), mask=query < num_queries)


@triton.jit
def mla_attention_bwd_preprocess_kernel(
    grad_ptr, out_ptr, delta_ptr, num_queries, num_rows, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    grad = _rows(grad_ptr, first, num_rows, BLOCK_U, BLOCK_M, BLOCK_U).to(tl.float32)  # [BLOCK_M, BLOCK_U]
    out = _rows(out_ptr, first, num_rows, BLOCK_U, BLOCK_M, BLOCK_U).to(tl.float32)
    row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M], a head of a query; out of it comes a query of a head
    token, head = row // H, row % H
    place = (token // num_queries * H + head) * num_queries + token % num_queries
    tl.store(delta_ptr + place, tl.sum(grad * out, axis=1), mask=row < num_rows)


@triton.jit
def mla_attention_bwd_key_value_kernel(
    grad_ptr, q_nope_ptr, q_rope_ptr, k_nope_ptr, k_rope_ptr, value_ptr, oldest_ptr, stop_ptr, length_ptr, lse_ptr,
    delta_ptr, grad_k_nope_ptr, grad_k_rope_ptr, grad_value_ptr, scale,
    num_queries, num_keys, scale_log2,
    H: tl.constexpr, Q_NOPE_T: tl.constexpr, Q_NOPE_H: tl.constexpr, Q_ROPE_T: tl.constexpr, Q_ROPE_H: tl.constexpr,
    K_NOPE_T: tl.constexpr, K_NOPE_H: tl.constexpr, K_ROPE_T: tl.constexpr,
    VALUE_T: tl.constexpr, VALUE_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_keys, BLOCK_S)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)  # a head of a sequence
    sequence, head = row // H, row % H
    first = tl.program_id(0) % num_tiles * BLOCK_S
    past = num_keys - num_queries
    length = tl.load(length_ptr)
    end = length - past
    key = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    last = tl.minimum(first + BLOCK_S, length) - 1
    stop = tl.load(stop_ptr + last, mask=last >= first, other=0)  # none beyond sees any of these keys
    grad_ptr += (sequence * num_queries * H + head) * BLOCK_U
    q_nope_ptr += sequence * num_queries * Q_NOPE_T + head * Q_NOPE_H
    q_rope_ptr += sequence * num_queries * Q_ROPE_T + head * Q_ROPE_H
    k_nope_ptr += sequence * num_keys * K_NOPE_T + head * K_NOPE_H
    k_rope_ptr += sequence * num_keys * K_ROPE_T
    value_ptr += sequence * num_keys * VALUE_T + head * VALUE_H

    k_nope = _rows(k_nope_ptr, first, length, K_NOPE_T, BLOCK_S, BLOCK_K)
    k_rope = _rows(k_rope_ptr, first, length, K_ROPE_T, BLOCK_S, BLOCK_R)
    value = _rows(value_ptr, first, length, VALUE_T, BLOCK_S, BLOCK_U)
    grad_k_nope = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    grad_k_rope = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    grad_value = tl.zeros([BLOCK_S, BLOCK_U], tl.float32)
    for start in range(tl.maximum(first - past, 0), stop - past, BLOCK_T):
        query = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        owned = query < end
        oldest = tl.load(oldest_ptr + past + query, mask=owned, other=num_keys)
        lse = tl.load(lse_ptr + row * num_queries + query, mask=owned, other=0.0)
        delta = tl.load(delta_ptr + row * num_queries + query, mask=owned, other=0.0)
        q_nope = _rows(q_nope_ptr, start, end, Q_NOPE_T, BLOCK_T, BLOCK_K)
        q_rope = _rows(q_rope_ptr, start, end, Q_ROPE_T, BLOCK_T, BLOCK_R)
        grad = _rows(grad_ptr, start, end, H * BLOCK_U, BLOCK_T, BLOCK_U)
        scores = tl.dot(k_nope, tl.trans(q_nope), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
        scores = tl.dot(k_rope, tl.trans(q_rope), scores, input_precision=PRECISION) * scale_log2
        seen = (key[:, None] <= past + query[None, :]) & (key[:, None] >= oldest[None, :])
        weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
        grad_scores = (weights * (grad_weights - delta[None, :])).to(grad.dtype)
        grad_k_nope = tl.dot(grad_scores, q_nope, grad_k_nope, input_precision=PRECISION)
        grad_k_rope = tl.dot(grad_scores, q_rope, grad_k_rope, input_precision=PRECISION)

    grad_k_nope_ptr += (sequence * num_keys * H + head) * BLOCK_K
    grad_k_rope_ptr += row * num_keys * BLOCK_R
    grad_value_ptr += (sequence * num_keys * H + head) * BLOCK_U
    _put_rows(grad_k_nope_ptr, grad_k_nope * scale, first, num_keys, H * BLOCK_K, BLOCK_S, BLOCK_K)
    _put_rows(grad_k_rope_ptr, grad_k_rope * scale, first, num_keys, BLOCK_R, BLOCK_S, BLOCK_R)
    _put_rows(grad_value_ptr, grad_value, first, num_keys, H * BLOCK_U, BLOCK_S, BLOCK_U)


@triton.jit
def mla_attention_bwd_query_kernel(
    grad_ptr, q_nope_ptr, q_rope_ptr, k_nope_ptr, k_rope_ptr, value_ptr, oldest_ptr, length_ptr, lse_ptr, delta_ptr,
    grad_q_nope_ptr, grad_q_rope_ptr, scale,
    num_queries, num_keys, scale_log2,
    H: tl.constexpr, Q_NOPE_T: tl.constexpr, Q_NOPE_H: tl.constexpr, Q_ROPE_T: tl.constexpr, Q_ROPE_H: tl.constexpr,
    K_NOPE_T: tl.constexpr, K_NOPE_H: tl.constexpr, K_ROPE_T: tl.constexpr,
    VALUE_T: tl.constexpr, VALUE_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_queries, BLOCK_T)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)  # a head of a sequence
    sequence, head = row // H, row % H
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_T
    past = num_keys - num_queries
    length = tl.load(length_ptr)
    end = length - past
    query = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    owned = query < end
    oldest = tl.load(oldest_ptr + past + query, mask=owned, other=num_keys)
    lse = tl.load(lse_ptr + row * num_queries + query, mask=owned, other=0.0)
    delta = tl.load(delta_ptr + row * num_queries + query, mask=owned, other=0.0)
    grad_ptr += (sequence * num_queries * H + head) * BLOCK_U
    q_nope_ptr += sequence * num_queries * Q_NOPE_T + head * Q_NOPE_H
    q_rope_ptr += sequence * num_queries * Q_ROPE_T + head * Q_ROPE_H
    k_nope_ptr += sequence * num_keys * K_NOPE_T + head * K_NOPE_H
    k_rope_ptr += sequence * num_keys * K_ROPE_T
    value_ptr += sequence * num_keys * VALUE_T + head * VALUE_H

    q_nope = _rows(q_nope_ptr, first, end, Q_NOPE_T, BLOCK_T, BLOCK_K)
    q_rope = _rows(q_rope_ptr, first, end, Q_ROPE_T, BLOCK_T, BLOCK_R)
    grad = _rows(grad_ptr, first, end, H * BLOCK_U, BLOCK_T, BLOCK_U)
    grad_q_nope = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    grad_q_rope = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    begin, stop = tl.load(oldest_ptr + past + first), tl.minimum(past + first + BLOCK_T, length)
    for start in range(begin, stop, BLOCK_S):
        k_nope = _rows(k_nope_ptr, start, length, K_NOPE_T, BLOCK_S, BLOCK_K)
        k_rope = _rows(k_rope_ptr, start, length, K_ROPE_T, BLOCK_S, BLOCK_R)
        value = _rows(value_ptr, start, length, VALUE_T, BLOCK_S, BLOCK_U)
        scores = tl.dot(q_nope, tl.trans(k_nope), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION) * scale_log2
        key = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        seen = (key[None, :] <= past + query[:, None]) & (key[None, :] >= oldest[:, None])
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        # All keys at hand: what is taken away is the sum of these very numbers, and not of those rounded in `out`.
        # Chosen and not branched to, as a branch keeps the products of two blocks from overlapping.
        delta = tl.where(begin + BLOCK_S >= stop, tl.sum(weights * grad_weights, axis=1), delta)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(grad.dtype)
        grad_q_nope = tl.dot(grad_scores, k_nope, grad_q_nope, input_precision=PRECISION)
        grad_q_rope = tl.dot(grad_scores, k_rope, grad_q_rope, input_precision=PRECISION)

    tl.store(delta_ptr + row * num_queries + query, delta, mask=owned)
    grad_q_nope_ptr += (sequence * num_queries * H + head) * BLOCK_K
    grad_q_rope_ptr += (sequence * num_queries * H + head) * BLOCK_R
    _put_rows(grad_q_nope_ptr, grad_q_nope * scale, first, num_queries, H * BLOCK_K, BLOCK_T, BLOCK_K)
    _put_rows(grad_q_rope_ptr, grad_q_rope * scale, first, num_queries, H * BLOCK_R, BLOCK_T, BLOCK_R)
