"""Triton twin of `moe_mlp`: two grouped products of `fused/grouped_mm.py`, and what stands between and after them.

Letters: as in `workbench_kernels/moe_mlp.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused import grouped_mm
from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.expert_tiles import sort_by_expert
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.gated import GatedActivation

MIN_BLOCK_X = 64
MAX_BLOCK_X = 128
TILE = 1_024  # numbers of one program; larger ones spill for odd widths


class Forward(NamedTuple):
    """The output and what backward needs; without `keep` the products are empty."""

    out: Tensor
    gate_up: Tensor
    pair: Tensor
    row: Tensor
    offs: Tensor


@dataclass(frozen=True)
class Launch:
    """The tile of one program: rows, and numbers of a row that it reads at a time."""

    block_m: int
    block_x: int
    num_warps: int = 4


def launch_for(width: int) -> Launch:
    block_x = min(MAX_BLOCK_X, max(MIN_BLOCK_X, 1 << (width - 1).bit_length()))
    return Launch(TILE // block_x, block_x)


def _chosen(kernel: str, rows: Tensor) -> Launch:
    width = rows.shape[1]
    return chosen(launch_for(width), kernel, rows.device, width=width, bytes=rows.itemsize)


@on_its_device
def forward(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: GatedActivation,
    *,
    keep: bool = True,
) -> Forward:
    """The whole layer. Nothing of width K is kept for backward, and nothing waits for the device."""
    num_slots = indices.shape[1]
    offs, pair, row = sort_by_expert(indices, len(w13))
    hidden_MF, gate_up_M2F = grouped_mm.forward(
        x, w13, offs, bias=b13, gather=pair, gather_div=num_slots, activation=activation, keep=keep
    )
    y_MK = grouped_mm.forward(hidden_MF, w2, offs, bias=b2).out
    kept = x.new_empty(0) if gate_up_M2F is None else gate_up_M2F
    return Forward(_mix(y_MK, row, weights), kept, pair, row, offs)


@on_its_device
def backward(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    pair: Tensor,
    row: Tensor,
    offs: Tensor,
    b2: Tensor | None,
    has_b13: bool,
    activation: GatedActivation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w13, w2, weights, b13 and b2; those of biases that are not there are empty."""
    grad, weights, num_slots = grad.contiguous(), weights.contiguous(), indices.shape[1]
    b2 = None if b2 is None else b2.contiguous()
    # Of a row not yet weighted.
    grad_hidden_MF = grouped_mm.forward(grad, w2.transpose(1, 2), offs, gather=pair, gather_div=num_slots).out
    num_rows, width = grad_hidden_MF.shape
    grad_gate_up_M2F, hidden_MF = torch.empty_like(gate_up), torch.empty_like(grad_hidden_MF)
    grad_weights = torch.empty_like(weights)
    if num_rows:
        tile = _chosen("moe_mlp_bwd_kernel", grad_hidden_MF)
        moe_mlp_bwd_kernel[(cdiv(num_rows, tile.block_m),)](
            gate_up, grad_hidden_MF, weights, pair, indices.contiguous(), grad, b2,
            grad_gate_up_M2F, hidden_MF, grad_weights, num_rows, *activation,
            width, grad.shape[1], num_slots, tile.block_m, tile.block_x,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    weight_M = None if b2 is None else weights.flatten()[pair].to(torch.float32)
    grad_w2, grad_b2 = grouped_mm.weight_grad(
        grad, hidden_MF, offs, grad_gather=pair, gather_div=num_slots, with_bias=b2 is not None, bias_scale=weight_M
    )
    grad_rows_MK = grouped_mm.forward(grad_gate_up_M2F, w13.transpose(1, 2), offs).out
    grad_w13, grad_b13 = grouped_mm.weight_grad(
        grad_gate_up_M2F, x, offs, x_gather=pair, gather_div=num_slots, with_bias=has_b13
    )
    grad_b13, grad_b2 = (x.new_empty(0) if part is None else part for part in (grad_b13, grad_b2))
    return _mix(grad_rows_MK, row, None), grad_w13, grad_w2, grad_weights, grad_b13, grad_b2


def _mix(rows_MK: Tensor, row_NA: Tensor, weights_NA: Tensor | None) -> Tensor:
    """Sum each token's rows, one after the other and so the same in every run."""
    num_tokens, num_slots = row_NA.shape
    out = rows_MK.new_empty(num_tokens, rows_MK.shape[1])
    if num_tokens:
        tile = _chosen("moe_mlp_fwd_kernel", rows_MK)
        grid = (cdiv(num_tokens, tile.block_m), cdiv(rows_MK.shape[1], tile.block_x))
        moe_mlp_fwd_kernel[grid](
            rows_MK, row_NA, None if weights_NA is None else weights_NA.contiguous(), out,
            num_tokens, rows_MK.shape[1], num_slots, tile.block_m, tile.block_x,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose, filled and not quite filled; the products are `grouped_mm`'s."""
    tensors = ("gate_up", "grad_hidden", "weights", "grad", "grad_gate_up", "hidden", "grad_weights")
    back = {f"{name}_ptr": f"*{kind}" for name in tensors} | {"pair_ptr": "*i32", "indices_ptr": "*i64"}
    back |= {"num_rows": "i32"} | dict.fromkeys(("limit", "alpha", "raised"), "fp32")
    ahead = {"rows_ptr": f"*{kind}", "row_ptr": "*i32", "out_ptr": f"*{kind}", "num_tokens": "i32"}
    found = []
    block_x = MIN_BLOCK_X
    while block_x <= MAX_BLOCK_X:
        for width in (block_x - 1, block_x):
            tile = launch_for(width)
            sizes = {"K": width, "A": 8, "BLOCK_M": tile.block_m, "BLOCK_X": tile.block_x}
            for given in (False, True):
                weights: dict[str, str] = {"weights_ptr": "*fp32"} if given else {}
                bias: dict[str, str] = {"b2_ptr": f"*{kind}"} if given else {}
                found += [
                    Case(
                        *(f"moe_mlp_fwd_kernel K={width}{' weighted' * given}", moe_mlp_fwd_kernel, ahead | weights),
                        *(sizes | ({} if given else {"weights_ptr": None}), tile.num_warps),
                    ),
                    Case(
                        *(f"moe_mlp_bwd_kernel F={width}{' biased' * given}", moe_mlp_bwd_kernel, back | bias),
                        *(sizes | {"F": width} | ({} if given else {"b2_ptr": None}), tile.num_warps),
                    ),
                ]
        block_x *= 2
    return found


@triton.jit
def moe_mlp_fwd_kernel(
    rows_ptr, row_ptr, weights_ptr, out_ptr, num_tokens, K: tl.constexpr, A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(1).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)  # [BLOCK_X]
    known = token < num_tokens
    inside = known[:, None] & (column < K)[None, :]  # [BLOCK_M, BLOCK_X]
    total = tl.zeros([BLOCK_M, BLOCK_X], dtype=tl.float32)
    for a in range(0, A):
        row = tl.load(row_ptr + token * A + a, mask=known, other=0).to(tl.int64)
        y = tl.load(rows_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + token * A + a, mask=known, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(out_ptr + token[:, None] * K + column[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moe_mlp_bwd_kernel(
    gate_up_ptr, grad_hidden_ptr, weights_ptr, pair_ptr, indices_ptr, grad_ptr, b2_ptr,
    grad_gate_up_ptr, hidden_ptr, grad_weights_ptr, num_rows, limit, alpha, raised,
    F: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Through weight and activation; the hidden rows are made again, weighted, for the gradient of w2."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    known = row < num_rows
    pair = tl.load(pair_ptr + row, mask=known, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + pair, mask=known, other=0.0).to(tl.float32)[:, None]  # [BLOCK_M, 1]
    of_weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    dtype = hidden_ptr.dtype.element_ty
    for first in range(0, F, BLOCK_X):
        column = first + tl.arange(0, BLOCK_X)  # [BLOCK_X]
        inside = known[:, None] & (column < F)[None, :]  # [BLOCK_M, BLOCK_X]
        wide = row[:, None] * (2 * F) + column[None, :]
        narrow = row[:, None] * F + column[None, :]
        gate = tl.load(gate_up_ptr + wide, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + wide + F, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_hidden_ptr + narrow, mask=inside, other=0.0).to(tl.float32)

        low = tl.where(gate > limit, limit, gate)  # not a minimum, which on a GPU passes over what is no number
        sigmoid = tl.sigmoid(alpha * low)
        gated = low * sigmoid
        lifted = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + raised
        hidden = gated * lifted
        of_weight += tl.sum(grad * hidden, axis=1)
        tl.store(hidden_ptr + narrow, (hidden * weight).to(dtype), mask=inside)
        grad *= weight
        of_gate = grad * lifted * sigmoid * (1.0 + alpha * low * (1.0 - sigmoid))
        of_up = grad * gated
        # At the limit itself the gradient passes, as in torch's clamp.
        of_gate = tl.where(gate <= limit, of_gate, 0.0)
        of_up = tl.where(tl.abs(up) <= limit, of_up, 0.0)
        tl.store(grad_gate_up_ptr + wide, of_gate.to(dtype), mask=inside)
        tl.store(grad_gate_up_ptr + wide + F, of_up.to(dtype), mask=inside)

    if b2_ptr is not None:
        expert = tl.load(indices_ptr + pair, mask=known, other=0)
        for first in range(0, K, BLOCK_X):
            column = first + tl.arange(0, BLOCK_X)
            inside = known[:, None] & (column < K)[None, :]
            grad = tl.load(grad_ptr + (pair // A)[:, None] * K + column[None, :], mask=inside, other=0.0)
            bias = tl.load(b2_ptr + expert[:, None] * K + column[None, :], mask=inside, other=0.0)
            of_weight += tl.sum(grad.to(tl.float32) * bias.to(tl.float32), axis=1)
    tl.store(grad_weights_ptr + pair, of_weight.to(grad_weights_ptr.dtype.element_ty), mask=known)
