"""Rows sorted by expert: where each comes from, and what happens to every expert's rows alike.

Letters: N tokens, A experts per token, M rows sorted by expert (N * A of them, and padding), P padding rows, E experts,
K width, X any width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.grouped_mm import group_sizes


class Order(NamedTuple):
    """Where the rows of every expert come from, and the rows that only fill its group up."""

    pair_M: Tensor  # row -> flattened (token, slot) pair; 0 for padding
    row_NA: Tensor  # the inverse: token, slot -> row
    offs_E: Tensor  # int32 inclusive ends
    padding_P: Tensor  # rows that belong to no pair


def group_unit(dtype: torch.dtype, num_pairs: int, num_experts: int) -> int:
    """Every group is filled up to a multiple of this many rows.

    In 16-bit types a CPU's matrix library compiles a kernel for every number of rows that it meets, which takes longer
    than the product; multiples of 16 soon are all known. Where groups are smaller than that, padding would cost more.
    """
    return 16 if dtype in (torch.bfloat16, torch.float16) and num_pairs >= 16 * num_experts else 1


def sort_by_expert(indices: Tensor, num_experts: int, *, unit: int = 1) -> Order:
    """Sort the (token, slot) pairs by expert, tokens in order within each; groups begin at multiples of `unit`.

    There are N * A + num_experts * (unit - 1) rows, however the tokens chose.

    Raises:
        ValueError: an index lies outside 0..num_experts-1.
    """
    pairs = indices.reshape(-1)
    if pairs.numel():
        check_experts(torch.stack(pairs.aminmax()).tolist(), num_experts)
    sorted_pairs = pairs.to(torch.int32).argsort(stable=True)
    counts_E = pairs.bincount(minlength=num_experts)
    padded_E = (counts_E + unit - 1).div(unit, rounding_mode="floor") * unit
    shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)  # padding before each group
    rows = torch.arange(pairs.numel(), device=pairs.device) + shift_E[pairs[sorted_pairs]]
    row_of_pair = torch.empty_like(sorted_pairs)
    row_of_pair[sorted_pairs] = rows
    pair_M = sorted_pairs.new_zeros(pairs.numel() + num_experts * (unit - 1))
    pair_M[rows] = sorted_pairs
    filled_M = torch.zeros_like(pair_M, dtype=torch.bool)
    filled_M[rows] = True
    padding_P = (~filled_M).nonzero().squeeze(1)
    return Order(pair_M, row_of_pair.view(indices.shape), padded_E.cumsum(0, dtype=torch.int32), padding_P)


def check_experts(span: Sequence[int], num_experts: int) -> None:
    """Refuse a smallest or largest index that names no expert."""
    if not 0 <= span[0] <= span[1] < num_experts:
        raise ValueError(f"indices span {span[0]}..{span[1]} and must lie in 0..{num_experts - 1}")


def take_rows(x: Tensor, order: Order, out: Tensor | None = None) -> Tensor:
    """[M, K], the token of each row of `x` [N, K], zero in padding; into `out` if there is one."""
    token_M = order.pair_M.div(order.row_NA.shape[1], rounding_mode="floor")
    rows_MK = x.index_select(0, token_M) if out is None else torch.index_select(x, 0, token_M, out=out)
    return rows_MK.index_fill_(0, order.padding_P, 0)


def add_bias_(rows_MX: Tensor, bias_EX: Tensor | None, offs_E: Tensor) -> None:
    """Add to every row the bias of the expert that owns it."""
    if bias_EX is not None:
        owned = int(offs_E[-1])
        rows_MX[:owned] += bias_of_rows(bias_EX, offs_E, owned)


def bias_of_rows(bias_EX: Tensor, offs_E: Tensor, num_rows: int) -> Tensor:
    """[num_rows, X], the bias of the expert that owns each row; zero in rows that none owns."""
    groups = group_sizes(offs_E, num_rows)
    rest = bias_EX.new_zeros(num_rows - sum(groups), bias_EX.shape[1])
    return torch.cat((*(row.expand(n, -1) for row, n in zip(bias_EX, groups, strict=True)), rest))


def group_sums(rows_MX: Tensor, offs_E: Tensor) -> Tensor:
    """[E, X], the sum of every expert's rows."""
    groups = group_sizes(offs_E, len(rows_MX))
    return torch.stack([rows.sum(0) for rows in rows_MX[: sum(groups)].split(groups)])
