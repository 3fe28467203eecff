"""Triton kernels that sort pairs by expert and cut the rows into tiles: a counting sort in three stages.

Every block of pairs counts its experts; the counts are summed along the blocks; each pair then finds its row from the
rows before its expert's, before its block's, and before it in its block. Integers only, so the order of sums is free.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.expert_tiles import MAX_EXPERTS, MAX_TILES, most_tiles
from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.on_its_device import on_its_device

BLOCK_P = 64  # pairs of one program
BLOCK_E = 32  # experts counted at a time
BLOCK_B = 64  # blocks of pairs summed at a time
NUM_WARPS = 4
TILE = 4_096  # tiles x experts of one program of the map


@on_its_device
def expert_order(indices: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of an `ExpertOrder`; `indices` are int64 [N, A]."""
    offs, pair, row = sort_by_expert(indices, num_experts)
    tiles = _tile_map(offs, len(pair), tile_rows, most_tiles(len(pair), num_experts, tile_rows))
    return offs, pair, row, tiles


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of an `ExpertOrder` but for the tiles.

    Raises:
        ValueError: there are more experts than one program can hold.
    """
    _check(num_experts)
    pairs = indices.contiguous()
    num_pairs, num_blocks = pairs.numel(), max(1, cdiv(pairs.numel(), BLOCK_P))
    before = pairs.new_empty(num_blocks, num_experts, dtype=torch.int32)
    counts = pairs.new_empty(num_experts, dtype=torch.int32)
    expert_count_kernel[(num_blocks,)](
        pairs, before, num_pairs, num_experts, BLOCK_P, BLOCK_E,
        num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    expert_sum_kernel[(cdiv(num_experts, BLOCK_E),)](
        before, counts, num_blocks, num_experts, BLOCK_B, BLOCK_E,
        num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    offs = counts.cumsum(0, dtype=torch.int32)
    # Zeros: a pair whose expert is none has no row, and a row without a pair may be read.
    pair, row = (pairs.new_zeros(num_pairs, dtype=torch.int32) for _ in range(2))
    if num_pairs:
        expert_place_kernel[(num_blocks,)](
            pairs, before, counts, offs, pair, row, num_pairs, num_experts, BLOCK_P,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return offs, pair, row.view(indices.shape)


def tile_map(offs: Tensor, num_rows: int, tile_rows: int) -> Tensor:
    """As `workbench_kernels.expert_tiles.tile_map`.

    Raises:
        ValueError: there are more experts than one program can hold.
    """
    _check(len(offs))
    return _tile_map(offs, num_rows, tile_rows, most_tiles(num_rows, len(offs) + 1, tile_rows))


def _check(num_experts: int) -> None:
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"the fused tier takes up to {MAX_EXPERTS} experts, not {num_experts}")


def _tile_map(offs: Tensor, num_rows: int, tile_rows: int, num_tiles: int) -> Tensor:
    if num_rows // tile_rows >= MAX_TILES:
        raise ValueError(f"{num_rows} rows are more than {MAX_TILES} tiles of {tile_rows}")
    tiles = offs.new_empty(num_tiles)
    block_e = max(32, 1 << len(offs).bit_length())  # all experts, and the rows that none owns
    block_z = TILE // block_e
    expert_tile_kernel[(cdiv(num_tiles, block_z),)](
        offs, tiles, num_rows, num_tiles, len(offs), tile_rows, block_z, block_e,
        num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return tiles


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose; tensors are integers whatever the type of the weights."""
    counts = {"before_ptr": "*i32", "num_experts": "i32"}
    pairs = {"pairs_ptr": "*i64", "num_pairs": "i32"}
    ends = {"counts_ptr": "*i32", "offs_ptr": "*i32"}
    rows = {"pair_ptr": "*i32", "row_ptr": "*i32"}
    found = [
        Case(
            "expert_count_kernel",
            expert_count_kernel,
            pairs | counts,
            {"BLOCK_P": BLOCK_P, "BLOCK_E": BLOCK_E},
            NUM_WARPS,
        ),
        Case(
            *("expert_sum_kernel", expert_sum_kernel, counts | {"counts_ptr": "*i32", "num_blocks": "i32"}),
            *({"BLOCK_B": BLOCK_B, "BLOCK_E": BLOCK_E}, NUM_WARPS),
        ),
        Case("expert_place_kernel", expert_place_kernel, pairs | counts | ends | rows, {"BLOCK_P": BLOCK_P}, NUM_WARPS),
    ]
    block_e = 32
    while block_e <= MAX_EXPERTS + 1:
        arguments = {"offs_ptr": "*i32", "tiles_ptr": "*i32", "num_rows": "i32", "num_tiles": "i32"}
        constants = {"E": block_e - 1, "TILE_ROWS": 128, "BLOCK_Z": TILE // block_e, "BLOCK_E": block_e}
        found.append(Case(f"expert_tile_kernel E={block_e - 1}", expert_tile_kernel, arguments, constants, NUM_WARPS))
        block_e *= 2
    return found


@triton.jit
def expert_count_kernel(pairs_ptr, before_ptr, num_pairs, num_experts, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    pair = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    expert = tl.load(pairs_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    for first in range(0, num_experts, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        chosen = (expert[:, None] == column[None, :]).to(tl.int32)  # [BLOCK_P, BLOCK_E]
        tl.store(before_ptr + block * num_experts + column, tl.sum(chosen, axis=0), mask=column < num_experts)


@triton.jit
def expert_sum_kernel(before_ptr, counts_ptr, num_blocks, num_experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Turn the count of each block into the sum of the blocks before it."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        inside = (block < num_blocks)[:, None] & (column < num_experts)[None, :]  # [BLOCK_B, BLOCK_E]
        place = before_ptr + block[:, None].to(tl.int64) * num_experts + column[None, :]
        count = tl.load(place, mask=inside, other=0)
        tl.store(place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(counts_ptr + column, total, mask=column < num_experts)


@triton.jit
def expert_place_kernel(
    pairs_ptr, before_ptr, counts_ptr, offs_ptr, pair_ptr, row_ptr, num_pairs, num_experts, BLOCK_P: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    pair = block * BLOCK_P + place
    inside = pair < num_pairs
    expert = tl.load(pairs_ptr + pair, mask=inside, other=-1)
    inside = inside & (expert >= 0) & (expert < num_experts)
    # Read a second time, so that it lies along the other axis.
    other = tl.load(pairs_ptr + block * BLOCK_P + tl.arange(0, BLOCK_P), mask=inside, other=-1)
    earlier = (other[None, :] == expert[:, None]) & (place[None, :] < place[:, None])  # [BLOCK_P, BLOCK_P]
    row = tl.load(offs_ptr + expert, mask=inside, other=0) - tl.load(counts_ptr + expert, mask=inside, other=0)
    row += tl.load(before_ptr + block * num_experts + expert, mask=inside, other=0)
    row += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(row_ptr + pair, row, mask=inside)
    tl.store(pair_ptr + row, pair.to(tl.int32), mask=inside)


@triton.jit
def expert_tile_kernel(
    offs_ptr, tiles_ptr, num_rows, num_tiles,
    E: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) * BLOCK_Z + tl.arange(0, BLOCK_Z)  # [BLOCK_Z]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]; E stands for the rows that none owns
    start = tl.load(offs_ptr + expert - 1, mask=(expert > 0) & (expert <= E), other=0)
    end = tl.load(offs_ptr + expert, mask=expert < E, other=0)
    end = tl.where(expert == E, num_rows, end)
    tiles = tl.where(expert <= E, (tl.maximum(end - start, 0) + TILE_ROWS - 1) // TILE_ROWS, 0)
    last = tl.cumsum(tiles, axis=0)  # [BLOCK_E], inclusive ends
    # The expert of a tile is the number of those whose tiles all come before it.
    owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # [BLOCK_Z]
    first = tl.sum(tl.where(expert[None, :] == owner[:, None], (last - tiles)[None, :], 0), axis=1)
    packed = tl.where(owner <= E, ((tile - first) << 16) | owner, -1)
    tl.store(tiles_ptr + tile, packed.to(tl.int32), mask=tile < num_tiles)
