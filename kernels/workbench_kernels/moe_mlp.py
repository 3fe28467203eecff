"""The whole expert layer: every token through its experts' SwiGLU, mixed by the router's weights.

Letters: N tokens, A experts per token, M rows sorted by expert (N * A of them, and padding), P padding rows, E experts,
K width, F hidden width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.grouped_mm import rows_by_experts, rows_by_rows
from workbench_kernels.tier import resolve


def moe_mlp(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, *, impl: str = "auto") -> Tensor:
    """Sum over a token's experts e of `weights * (silu(x @ gate[e].T) * (x @ up[e].T)) @ w2[e].T`.

    Args:
        x: [N, K] tokens.
        w13: [E, 2F, K], gate above up, of the dtype of `x`.
        w2: [E, K, F], of the dtype of `x`.
        indices: int64 [N, A], the experts of each token, in 0..E-1.
        weights: [N, A], in the dtype of `x` or float32.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        [N, K] in the dtype of `x`. The gradient of an expert that no token chose is exactly zero.
        For backward the torch form keeps the gate and up products [M, 2F] and nothing else as large.

    Raises:
        ValueError: shapes or dtypes do not fit, or an index lies outside 0..E-1.
    """
    _check(x, w13, w2, indices, weights)
    if resolve("moe_mlp", impl, x.device, x.dtype) == "reference":
        return reference(x, w13, w2, indices, weights)
    return _moe_mlp(x, w13, w2, indices, weights)[0]


def reference(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The definition: one expert after the other; the sum over experts in float32 or wider."""
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert in range(w13.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w13[expert].T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2[expert].T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out.to(x.dtype)


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
    if pairs.numel() and not 0 <= (bounds := torch.stack(pairs.aminmax()).tolist())[0] <= bounds[1] < num_experts:
        raise ValueError(f"indices span {bounds[0]}..{bounds[1]} and must lie in 0..{num_experts - 1}")
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


def take_rows(x: Tensor, order: Order, out: Tensor | None = None) -> Tensor:
    """[M, K], the token of each row of `x` [N, K], zero in padding; into `out` if there is one."""
    token_M = order.pair_M.div(order.row_NA.shape[1], rounding_mode="floor")
    rows_MK = x.index_select(0, token_M) if out is None else torch.index_select(x, 0, token_M, out=out)
    return rows_MK.index_fill_(0, order.padding_P, 0)


def _check(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> None:
    if x.ndim != 2 or w13.ndim != 3 or w2.ndim != 3:
        raise ValueError(f"x has {x.ndim} axes, w13 {w13.ndim} and w2 {w2.ndim}; they must have 2, 3 and 3")
    num_experts, width, hidden = w2.shape
    if w13.shape != (num_experts, 2 * hidden, width) or x.shape[1] != width or num_experts == 0:
        raise ValueError(
            f"x {list(x.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)} must be [N, K], [E, 2F, K], [E, K, F]"
        )
    if not x.is_floating_point() or not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x ({x.dtype}), w13 ({w13.dtype}) and w2 ({w2.dtype}) must have one floating dtype")
    if indices.dtype != torch.int64 or indices.ndim != 2 or indices.shape[0] != x.shape[0] or indices.shape[1] == 0:
        raise ValueError(f"indices ({indices.dtype} {list(indices.shape)}) must be int64 [{x.shape[0]}, A] with A > 0")
    if weights.shape != indices.shape or weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weights ({weights.dtype} {list(weights.shape)}) must be {list(indices.shape)} in {x.dtype} or float32"
        )


@torch.library.custom_op("workbench_kernels::moe_mlp", mutates_args=(), device_types="cpu")
def _moe_mlp(
    x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output and, for backward, the gate and up products and the order of the rows."""
    unit = group_unit(x.dtype, indices.numel(), w13.shape[0])
    order = sort_by_expert(indices, w13.shape[0], unit=unit)
    gate_up_M2F = rows_by_experts(take_rows(x, order), w13, order.offs_E)
    gate_MF, up_MF = gate_up_M2F.chunk(2, dim=1)
    y_MK = rows_by_experts(F.silu(gate_MF).mul_(up_MF), w2, order.offs_E)
    pair_M, row_NA, offs_E, padding_P = order
    return _mix(y_MK, row_NA, weights), gate_up_M2F, pair_M, row_NA, offs_E, padding_P


@_moe_mlp.register_fake
def _(
    x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts = w13.shape[0]
    num_padding = num_experts * (group_unit(x.dtype, indices.numel(), num_experts) - 1)
    num_rows = indices.numel() + num_padding
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(num_rows, w13.shape[1]),
        indices.new_empty(num_rows),
        indices.new_empty(indices.shape),
        indices.new_empty(num_experts, dtype=torch.int32),
        indices.new_empty(num_padding),
    )


@torch.library.custom_op("workbench_kernels::moe_mlp_grad", mutates_args=(), device_types="cpu")
def _moe_mlp_grad(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    pair: Tensor,
    row: Tensor,
    offs: Tensor,
    padding: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w13, w2 and weights."""
    order = Order(pair, row, offs, padding)
    weight_M1 = weights.reshape(-1, 1).index_select(0, pair).to(x.dtype)
    gate_MF, up_MF = gate_up.chunk(2, dim=1)
    silu_MF = F.silu(gate_MF)
    hidden_MF = silu_MF * up_MF

    grad_y_MK = take_rows(grad, order)  # of a row not yet weighted
    grad_hidden_MF = rows_by_experts(grad_y_MK, w2.transpose(1, 2), offs)
    sum_dtype = torch.promote_types(x.dtype, weights.dtype)
    grad_weight_M = (grad_hidden_MF * hidden_MF).sum(dim=1, dtype=sum_dtype)
    grad_weights = grad_weight_M.index_select(0, row.view(-1)).view_as(row).to(weights.dtype)
    grad_w2 = rows_by_rows(grad_y_MK, hidden_MF.mul_(weight_M1), offs)

    grad_hidden_MF.mul_(weight_M1)
    grad_gate_up_M2F = torch.empty_like(gate_up)
    grad_gate_MF, grad_up_MF = grad_gate_up_M2F.chunk(2, dim=1)
    torch.mul(grad_hidden_MF, silu_MF, out=grad_up_MF)
    torch.ops.aten.silu_backward.grad_input(grad_hidden_MF.mul_(up_MF), gate_MF, grad_input=grad_gate_MF)

    grad_rows_MK = rows_by_experts(grad_gate_up_M2F, w13.transpose(1, 2), offs)
    grad_w13 = rows_by_rows(grad_gate_up_M2F, take_rows(x, order, out=grad_y_MK), offs)
    return _mix(grad_rows_MK, row, None), grad_w13, grad_w2, grad_weights


@_moe_mlp_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    pair: Tensor,
    row: Tensor,
    offs: Tensor,
    padding: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w13.new_empty(w13.shape),
        w2.new_empty(w2.shape),
        weights.new_empty(weights.shape),
    )


def _mix(rows_MK: Tensor, row_NA: Tensor, weights_NA: Tensor | None) -> Tensor:
    """Sum each token's rows, one after the other and so the same in every run."""
    if row_NA.numel() == 0:
        return rows_MK.new_empty(row_NA.shape[0], rows_MK.shape[1])
    weights_NA = None if weights_NA is None else weights_NA.to(rows_MK.dtype)
    return F.embedding_bag(row_NA, rows_MK, mode="sum", per_sample_weights=weights_NA)


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, w13, w2, _, weights = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # otherwise a zero gradient of what is kept is made for every backward
    ctx.save_for_backward(x, w13, w2, weights, *kept)


def _backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grad_x, grad_w13, grad_w2, grad_weights = _moe_mlp_grad(grad, *ctx.saved_tensors)
    return grad_x, grad_w13, grad_w2, None, grad_weights


_moe_mlp.register_autograd(_backward, setup_context=_save)
