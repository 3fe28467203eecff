"""The order in which experts compute, and the tiles that their rows are cut into, without waiting for the device.

Letters: N tokens, A experts per token, P = N * A pairs (token, slot), E experts, Z tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_EXPERTS = 2_047  # one program of the Triton twins holds the ends of all
MAX_TILES = 2**15 - 1  # of one expert: what the upper half of an int32 can count


class ExpertOrder(NamedTuple):
    """P pairs sorted by expert, pairs in order within each, and their rows cut into tiles.

    `tiles` has room for the most tiles that any choice of experts can need. A tile is `local << 16 | expert`: the
    rows from `local * tile_rows` on of that expert's rows. The rest is -1, and comes last.
    """

    offs: Tensor  # int32 [E], inclusive ends of each expert's rows
    pair: Tensor  # int32 [P], row -> flattened (token, slot) pair
    row: Tensor  # int32 [N, A], the inverse
    tiles: Tensor  # int32 [Z]


def most_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that the rows of `num_experts` experts can need, however they are spread."""
    return num_experts + num_rows // tile_rows


def expert_order(indices: Tensor, num_experts: int, *, tile_rows: int, fused: bool = False) -> ExpertOrder:
    """Sort the pairs of `indices`, int64 [N, A] in 0..num_experts-1; `fused` by Triton kernels."""
    return ExpertOrder(*_expert_order(indices, num_experts, tile_rows, fused))


def reference(indices: Tensor, num_experts: int, tile_rows: int) -> ExpertOrder:
    """The definition."""
    pairs_P = indices.flatten()
    pair_P = pairs_P.argsort(stable=True)
    row_P = torch.empty_like(pair_P).scatter_(0, pair_P, torch.arange(len(pair_P), device=indices.device))
    counts_E = pairs_P.new_zeros(num_experts).scatter_add_(0, pairs_P, torch.ones_like(pairs_P))
    offs_E = counts_E.cumsum(0, dtype=torch.int32)
    tiles_Z = tile_map(offs_E, len(pair_P), tile_rows)[: most_tiles(len(pair_P), num_experts, tile_rows)]
    return ExpertOrder(offs_E, pair_P.to(torch.int32), row_P.to(torch.int32).view(indices.shape), tiles_Z)


def tile_map(offs: Tensor, num_rows: int, tile_rows: int) -> Tensor:
    """The tiles of all rows, int32; those of rows that no expert owns carry E as their expert."""
    if num_rows // tile_rows >= MAX_TILES:
        raise ValueError(f"{num_rows} rows are more than {MAX_TILES} tiles of {tile_rows}")
    bounds = torch.cat((offs.new_zeros(1), offs, offs.new_full((1,), num_rows)))
    tiles_E = (bounds.diff() + tile_rows - 1).div(tile_rows, rounding_mode="floor")
    ends_E = tiles_E.cumsum(0)
    tile_Z = torch.arange(most_tiles(num_rows, len(tiles_E), tile_rows), device=offs.device)
    expert_Z = torch.searchsorted(ends_E, tile_Z, right=True).clamp(max=len(offs))
    local_Z = tile_Z - (ends_E - tiles_E)[expert_Z]
    return torch.where(tile_Z < ends_E[-1], (local_Z << 16) | expert_Z, -1).to(torch.int32)


@torch.library.custom_op("workbench_kernels::expert_order", mutates_args=())
def _expert_order(
    indices: Tensor, num_experts: int, tile_rows: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if fused:
        from workbench_kernels.fused import expert_tiles as twin

        return twin.expert_order(indices, num_experts, tile_rows)
    offs, pair, row, tiles = reference(indices, num_experts, tile_rows)
    return offs, pair, row, tiles


@_expert_order.register_fake
def _(indices: Tensor, num_experts: int, tile_rows: int, fused: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    as_int32 = indices.to(torch.int32)
    return (
        as_int32.new_empty(num_experts),
        as_int32.new_empty(indices.numel()),
        as_int32.new_empty(indices.shape),
        as_int32.new_empty(most_tiles(indices.numel(), num_experts, tile_rows)),
    )
