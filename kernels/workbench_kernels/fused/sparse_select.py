"""Triton twin of `sparse_select`.

Letters: B sequences, T queries, S keys, H index heads, K their width, Y chosen keys.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, merged
from workbench_kernels.fused.architecture import architecture_of, precision_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.sparse_select import MAX_KEYS, MAX_WIDTH, fits_twin, select_last

WIDTHS = (64, MAX_WIDTH)  # others are filled up with zeros, which change no product
FEW_QUERIES = 16  # those of new tokens: rows of a wider tile would be empty
FEW_ROWS, LONG_ROW = 128, 8_192  # not measured yet: fewer rows of more keys are left to torch's own kernels
ROW_BLOCK, ROW_WARPS = 512, 4  # how much of a row of scores is looked at together; more spills on some targets
PROGRAMS = 256  # the key's gradient is summed in parts until so many programs run; fixed, whatever the GPU

Kernel = Literal["fwd", "bwd_query", "bwd_key"]


@dataclass(frozen=True)
class Launch:
    """The tile of one program: queries and keys."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int = 2


def launch_for(kernel: Kernel, num_queries: int, dtype: torch.dtype, architecture: str) -> Launch:
    """The tile of a kernel whose operands are whole heads."""
    if dtype == torch.float32:
        # Three products of parts make one here, and the parts lie in registers.
        return {
            "fwd": Launch(16, 64, 8),
            "bwd_query": Launch(16, 32, 8),
            "bwd_key": Launch(32, 16, 4),
        }[kernel]
    if kernel == "fwd" and num_queries <= FEW_QUERIES:
        return Launch(FEW_QUERIES, 128, 4, 3)
    if kernel == "fwd":
        return Launch(128 if architecture in ("sm_90", "sm_100") else 64, 128, 8, 3)
    if architecture == "gfx942":
        return Launch(32, 32, 4)
    return Launch(64, 32 if kernel == "bwd_key" and architecture == "sm_80" else 64, 8)


def _chosen(kernel: Kernel, query: Tensor, architecture: str) -> Launch:
    _, num_queries, num_heads, width = query.shape
    about = 1 << num_queries.bit_length()
    shape = {"queries_below": about, "heads": num_heads, "width": width, "bytes": query.itemsize}
    picked = launch_for(kernel, num_queries, query.dtype, architecture)
    return chosen(picked, f"sparse_select_{kernel}_kernel", query.device, **shape)


@on_its_device
def forward(query: Tensor, key: Tensor, weight: Tensor, index_topk: int) -> tuple[Tensor, Tensor]:
    """Return scores [B, T, S] and keys [B, T, Y] of query [B, T, H, K], key [B, S, K] and weight [B, T, H]."""
    _check(query, key)
    num_sequences, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    scores = weight.new_empty(num_sequences, num_queries, num_keys)
    if scores.numel():
        architecture = architecture_of(query.device)
        query, key = _filled_up(query), _filled_up(key)
        tile = _chosen("fwd", query, architecture)
        sparse_select_fwd_kernel[(cdiv(num_keys, tile.block_s), cdiv(num_queries, tile.block_t), num_sequences)](
            query, key, weight.contiguous(), scores, num_queries, num_keys, num_heads,
            query.shape[3], precision_of(query.itemsize, architecture), tile.block_t, tile.block_s,
            num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    # A program chooses for a row: few long rows would leave most of a GPU idle.
    few = num_sequences * num_queries < FEW_ROWS and num_keys > LONG_ROW
    return scores, select_last(scores, index_topk) if few else choose(scores, index_topk)


def choose(scores: Tensor, index_topk: int) -> Tensor:
    """Return keys [B, T, Y] of contiguous scores [B, T, S].

    The kernel finds a row's keys from the first to the last; a stable sort of these few brings the best first.
    """
    num_sequences, num_queries, num_keys = scores.shape
    places = (num_sequences, num_queries, min(index_topk, num_keys))
    keys = torch.full(places, -1, dtype=torch.int64, device=scores.device)
    ranks = torch.full(places, torch.iinfo(torch.int32).min, dtype=torch.int32, device=scores.device)
    if scores.numel():
        sparse_select_topk_kernel[(num_sequences * num_queries,)](
            scores, keys, ranks, num_queries, num_keys, places[2], ROW_BLOCK,
            num_warps=ROW_WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return keys.gather(-1, ranks.sort(dim=-1, descending=True, stable=True).indices)


@on_its_device
def backward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and weight; the scores' gradient is rounded to the dtype of the products."""
    _check(query, key)
    num_sequences, num_queries, num_heads, width = query.shape
    num_keys = key.shape[1]
    if grad.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(weight)
    architecture = architecture_of(query.device)
    grad, weight = grad.contiguous(), weight.contiguous()
    query, key = _filled_up(query), _filled_up(key)
    precision = precision_of(query.itemsize, architecture)

    tile = _chosen("bwd_query", query, architecture)
    grad_query, grad_weight = torch.empty_like(query), torch.empty_like(weight)
    sparse_select_bwd_query_kernel[(cdiv(num_queries, tile.block_t), num_heads, num_sequences)](
        grad, query, key, weight, grad_query, grad_weight, num_queries, num_keys, num_heads,
        query.shape[3], precision, tile.block_t, tile.block_s,
        num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip

    tile = _chosen("bwd_key", query, architecture)
    num_query_blocks, num_key_blocks = cdiv(num_queries, tile.block_t), cdiv(num_keys, tile.block_s)
    blocks_per_part = cdiv(num_query_blocks, cdiv(PROGRAMS, num_key_blocks * num_sequences))
    num_parts = cdiv(num_query_blocks, blocks_per_part)
    partial = torch.empty(num_parts, *key.shape, dtype=torch.float32, device=key.device)
    sparse_select_bwd_key_kernel[(num_key_blocks, num_parts, num_sequences)](
        grad, query, key, weight, partial, num_queries, num_keys, num_heads, blocks_per_part,
        query.shape[3], precision, tile.block_t, tile.block_s,
        num_warps=tile.num_warps, num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    grad_key = partial.sum(dim=0).to(key.dtype)
    return grad_query[..., :width].contiguous(), grad_key[..., :width].contiguous(), grad_weight


def cases(kind: str) -> list[Case]:
    """Every tile that the launcher chooses, in both widths; where all targets choose the same one, it is one case."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    operands = {"query_ptr": f"*{kind}", "key_ptr": f"*{kind}", "weight_ptr": "*fp32"}
    operands |= dict.fromkeys(("num_queries", "num_keys", "num_heads"), "i32")
    grads = operands | {"grad_ptr": "*fp32", "grad_query_ptr": f"*{kind}", "grad_weight_ptr": "*fp32"}
    products: tuple[tuple[Kernel, Any, dict[str, str]], ...] = (
        ("fwd", sparse_select_fwd_kernel, operands | {"scores_ptr": "*fp32"}),
        ("bwd_query", sparse_select_bwd_query_kernel, grads),
        ("bwd_key", sparse_select_bwd_key_kernel, grads | {"partial_ptr": "*fp32", "blocks_per_part": "i32"}),
    )
    found = []
    for kernel, function, arguments in products:
        for num_queries, architecture, width in product((FEW_QUERIES, FEW_QUERIES + 1), SHARED_LIMIT, WIDTHS):
            tile = launch_for(kernel, num_queries, dtype, architecture)
            name = f"{function.__name__} K={width}, {tile.block_t} queries"
            constants = {"K": width, "PRECISION": precision_of(dtype.itemsize, architecture)}
            constants |= {"BLOCK_T": tile.block_t, "BLOCK_S": tile.block_s}
            matrix = "wide" if dtype != torch.float32 and tile.block_t >= 64 else "narrow"
            warps, stages = tile.num_warps, tile.num_stages
            found.append(Case(name, function, arguments, constants, warps, stages, matrix, (architecture,)))
    row = {"scores_ptr": "*fp32", "keys_ptr": "*i64", "ranks_ptr": "*i32"}
    row |= dict.fromkeys(("num_queries", "num_keys", "num_places"), "i32")
    topk = sparse_select_topk_kernel
    return [*merged(found), Case(topk.__name__, topk, row, {"BLOCK_S": ROW_BLOCK}, ROW_WARPS)]


def _filled_up(heads: Tensor) -> Tensor:
    """Contiguous, with zeros up to the next of `WIDTHS`."""
    width = next(width for width in WIDTHS if width >= heads.shape[-1])
    return F.pad(heads, (0, width - heads.shape[-1])).contiguous()


def _check(query: Tensor, key: Tensor) -> None:
    check_dtype(query.dtype)
    if not fits_twin(query.shape[-1], key.shape[1]):
        raise ValueError(
            f"the fused sparse_select takes heads of up to {MAX_WIDTH} numbers and up to {MAX_KEYS} keys, "
            f"not {query.shape[-1]} and {key.shape[1]}"
        )


# Of every tile the first element's address is counted in 64 bits, and from there its own in 32: addresses in 64 bits of
# all elements would take the registers that products need.


@triton.jit
def sparse_select_fwd_kernel(
    query_ptr, key_ptr, weight_ptr, scores_ptr, num_queries, num_keys, num_heads,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2).to(tl.int64)
    first_query = tl.program_id(1).to(tl.int64) * BLOCK_T
    first_key = tl.program_id(0).to(tl.int64) * BLOCK_S
    token = sequence * num_queries + first_query
    row, place, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, K)
    is_query = row < num_queries - first_query  # [BLOCK_T]
    is_key = place < num_keys - first_key  # [BLOCK_S]

    key_tile_ptr = key_ptr + (sequence * num_keys + first_key) * K
    key = tl.load(key_tile_ptr + (place[:, None] * K + column[None, :]), mask=is_key[:, None], other=0.0)
    scores = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    for head in range(num_heads):
        first = token * num_heads + head
        at = row * num_heads  # [BLOCK_T]
        query = tl.load(
            query_ptr + first * K + (at[:, None] * K + column[None, :]), mask=is_query[:, None], other=0.0
        )  # [BLOCK_T, K]
        weight = tl.load(weight_ptr + first + at, mask=is_query, other=0.0)  # [BLOCK_T]
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        # Not a maximum, which would make 0 of what is no number.
        scores += weight[:, None] * tl.where(product < 0, 0.0, product)
    scores_tile_ptr = scores_ptr + token * num_keys + first_key
    inside = is_query[:, None] & is_key[None, :]  # [BLOCK_T, BLOCK_S]
    tl.store(scores_tile_ptr + (row[:, None] * num_keys + place[None, :]), scores, mask=inside)


@triton.jit
def sparse_select_bwd_query_kernel(
    grad_ptr, query_ptr, key_ptr, weight_ptr, grad_query_ptr, grad_weight_ptr, num_queries, num_keys, num_heads,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2).to(tl.int64)
    first_query = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = sequence * num_queries + first_query
    first = token * num_heads + tl.program_id(1)
    row, place, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, K)
    is_query = row < num_queries - first_query  # [BLOCK_T]
    at = row * num_heads  # [BLOCK_T]
    head_offset = at[:, None] * K + column[None, :]  # [BLOCK_T, K]

    query = tl.load(query_ptr + first * K + head_offset, mask=is_query[:, None], other=0.0)  # [BLOCK_T, K]
    grad_query = tl.zeros([BLOCK_T, K], dtype=tl.float32)
    grad_weight = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first_key in range(0, num_keys, BLOCK_S):
        is_key = place < num_keys - first_key  # [BLOCK_S]
        key_tile_ptr = key_ptr + (sequence * num_keys + first_key) * K
        key = tl.load(key_tile_ptr + (place[:, None] * K + column[None, :]), mask=is_key[:, None], other=0.0)
        grad = tl.load(
            grad_ptr + token * num_keys + first_key + (row[:, None] * num_keys + place[None, :]),
            mask=is_query[:, None] & is_key[None, :], other=0.0,
        )  # [BLOCK_T, BLOCK_S]  # fmt: skip
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        passed = tl.where(product <= 0, 0.0, grad)
        grad_weight += tl.sum(passed * product, axis=1)
        grad_query = tl.dot(passed.to(key.dtype), key, grad_query, input_precision=PRECISION)

    weight = tl.load(weight_ptr + first + at, mask=is_query, other=0.0)  # [BLOCK_T]
    weighted = (grad_query * weight[:, None]).to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + first * K + head_offset, weighted, mask=is_query[:, None])
    tl.store(grad_weight_ptr + first + at, grad_weight, mask=is_query)


@triton.jit
def sparse_select_bwd_key_kernel(
    grad_ptr, query_ptr, key_ptr, weight_ptr, partial_ptr, num_queries, num_keys, num_heads, blocks_per_part,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    first_key = tl.program_id(0).to(tl.int64) * BLOCK_S
    row, place, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, K)
    is_key = place < num_keys - first_key  # [BLOCK_S]
    key_offset = place[:, None] * K + column[None, :]  # [BLOCK_S, K]

    key_tile_ptr = key_ptr + (sequence * num_keys + first_key) * K
    key = tl.load(key_tile_ptr + key_offset, mask=is_key[:, None], other=0.0)  # [BLOCK_S, K]
    grad_key = tl.zeros([BLOCK_S, K], dtype=tl.float32)
    for block in range(blocks_per_part):
        first_query = (part * blocks_per_part + block) * BLOCK_T
        token = sequence * num_queries + first_query
        is_query = row < num_queries - first_query  # [BLOCK_T]
        grad = tl.load(
            grad_ptr + token * num_keys + first_key + (row[None, :] * num_keys + place[:, None]),
            mask=is_key[:, None] & is_query[None, :], other=0.0,
        )  # [BLOCK_S, BLOCK_T]  # fmt: skip
        for head in range(num_heads):
            first = token * num_heads + head
            at = row * num_heads  # [BLOCK_T]
            query = tl.load(
                query_ptr + first * K + (at[:, None] * K + column[None, :]), mask=is_query[:, None], other=0.0
            )  # [BLOCK_T, K]
            weight = tl.load(weight_ptr + first + at, mask=is_query, other=0.0)  # [BLOCK_T]
            product = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
            passed = tl.where(product <= 0, 0.0, grad * weight[None, :])
            grad_key = tl.dot(passed.to(query.dtype), query, grad_key, input_precision=PRECISION)

    partial_tile_ptr = partial_ptr + ((part * tl.num_programs(2) + sequence) * num_keys + first_key) * K
    tl.store(partial_tile_ptr + key_offset, grad_key, mask=is_key[:, None])


@triton.jit
def in_order(score):
    """Integers that compare as the scores do: -0.0 is 0.0, and what is no number is above all."""
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    # Negative numbers are stored as sign and size: the larger the bits, the smaller the number.
    ordered = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0xFFFFFFFF, ordered)


@triton.jit
def sparse_select_topk_kernel(
    scores_ptr, keys_ptr, ranks_ptr, num_queries, num_keys, num_places, BLOCK_S: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    seen = num_keys - num_queries + (row % num_queries).to(tl.int32) + 1
    row_ptr = scores_ptr + row * num_keys
    place = tl.arange(0, BLOCK_S)
    bins = tl.arange(0, 512)

    # The lowest score to choose, found by eight bits at a time from the highest down, and how many of its equals there
    # are places for. A query that sees no more keys than there are places chooses all: those above 0.
    lowest = tl.full([], 0, tl.uint32)
    equals = tl.full([], 0, tl.int32) + num_places
    if seen > num_places:
        settled = tl.full([], 0, tl.uint32)  # the bits of `lowest` that are known
        for digit in range(4):
            shift = 24 - 8 * digit
            counts = tl.zeros([512], dtype=tl.int32)
            for first in range(0, seen, BLOCK_S):
                is_key = place < seen - first
                ordered = in_order(tl.load(row_ptr + first + place, mask=is_key, other=0.0))  # [BLOCK_S]
                alike = is_key & ((ordered & settled) == lowest)
                # All others fall into the bins after the 256 of a digit.
                counts += tl.histogram(tl.where(alike, (ordered >> shift) & 0xFF, 256).to(tl.int32), 512)
            counts = tl.where(bins < 256, counts, 0)
            found = tl.sum((tl.cumsum(counts, axis=0, reverse=True) >= equals).to(tl.int32), axis=0) - 1
            equals -= tl.sum(tl.where(bins > found, counts, 0), axis=0)
            lowest |= found.to(tl.uint32) << shift
            settled |= tl.full([], 0xFF, tl.uint32) << shift

    taken = tl.full([], 0, tl.int32)
    equals_before = tl.full([], 0, tl.int32)
    for first in range(0, seen, BLOCK_S):
        is_key = place < seen - first
        ordered = in_order(tl.load(row_ptr + first + place, mask=is_key, other=0.0))  # [BLOCK_S]
        is_equal = (is_key & (ordered == lowest)).to(tl.int32)
        is_among_first = equals_before + tl.cumsum(is_equal, axis=0) <= equals
        is_taken = is_key & ((ordered > lowest) | ((ordered == lowest) & is_among_first))
        at = row * num_places + taken + tl.cumsum(is_taken.to(tl.int32), axis=0) - 1  # [BLOCK_S]
        tl.store(keys_ptr + at, (first + place).to(tl.int64), mask=is_taken)
        tl.store(ranks_ptr + at, (ordered ^ 0x80000000).to(tl.int32, bitcast=True), mask=is_taken)
        taken += tl.sum(is_taken.to(tl.int32), axis=0)
        equals_before += tl.sum(is_equal, axis=0)
