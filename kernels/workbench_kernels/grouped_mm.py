"""Multiply groups of rows, each by the matrix of its expert."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import resolve


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, *, impl: str = "auto") -> Tensor:
    """`x[start:end] @ weight[e].T` for every expert e; rows at and beyond `offs[-1]` give zeros.

    Args:
        x: [M, K], rows sorted by expert.
        weight: [E, N, K] (experts, out, in), of the dtype of `x`.
        offs: int32 [E], the inclusive cumulative ends: expert e owns the rows `offs[e - 1]:offs[e]`.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        [M, N]. The gradient of an expert without rows is exactly zero, and so is that of rows that no expert owns,
        whatever these rows hold.

    Raises:
        ValueError: shapes or dtypes do not fit, or `offs` decreases or ends beyond M.

    Source: the convention of `torch.nn.functional.grouped_mm`, with weights as `nn.Linear` stores them.
    """
    _check(x, weight, offs)
    if resolve("grouped_mm", impl, x.device, x.dtype) == "reference":
        return reference(x, weight, offs)
    return _grouped_mm(x, weight, offs)


def reference(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The definition: one product per expert, differentiated by autograd."""
    groups = group_sizes(offs, x.shape[0])
    owned = sum(groups)
    products = [rows @ weight[expert].T for expert, rows in enumerate(x[:owned].split(groups))]
    unowned = x.new_zeros(x.shape[0] - owned, weight.shape[1])
    return torch.cat([*products, unowned])


def rows_by_experts(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The fast torch form of `grouped_mm`: the product alone, outside autograd."""
    groups = group_sizes(offs, x.shape[0])
    owned = sum(groups)
    if _torch_groups(x.dtype, *weight.shape[1:]):
        out = F.grouped_mm(x.contiguous(), _dense(weight).transpose(1, 2), offs=offs)
    else:
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, matrix, out_rows in zip(
            x[:owned].split(groups), weight.unbind(), out[:owned].split(groups), strict=True
        ):
            torch.mm(rows, matrix.t(), out=out_rows)
    out[owned:].zero_()
    return out


def rows_by_rows(grad: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """`grad[start:end].T @ x[start:end]` for every expert, in one tensor [E, N, K]: the weight's gradient."""
    groups = group_sizes(offs, x.shape[0])
    if _torch_groups(x.dtype, grad.shape[1], x.shape[1]):
        return F.grouped_mm(grad.contiguous().t(), x.contiguous(), offs=offs)
    owned = sum(groups)
    out = x.new_empty(len(groups), grad.shape[1], x.shape[1])
    for grad_rows, rows, matrix in zip(grad[:owned].split(groups), x[:owned].split(groups), out.unbind(), strict=True):
        torch.mm(grad_rows.t(), rows, out=matrix)
    return out


def group_sizes(offs: Tensor, num_rows: int) -> list[int]:
    """Rows of each expert.

    Raises:
        ValueError: the ends decrease, start below zero or go beyond the rows.
    """
    ends = offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(sizes) < 0 or ends[-1] > num_rows:
        raise ValueError(f"offs={ends} must not decrease and must lie in 0..{num_rows} (rows of x)")
    return sizes


def _torch_groups(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's own grouped product takes these operands: no float64, rows of whole 16 bytes."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        width > 0 and width * dtype.itemsize % 16 == 0 for width in widths
    )


def _dense(weight: Tensor) -> Tensor:
    return weight if weight.is_contiguous() or weight.transpose(1, 2).is_contiguous() else weight.contiguous()


def _check(x: Tensor, weight: Tensor, offs: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x {list(x.shape)} must be [M, K] and weight {list(weight.shape)} [E, N, K]")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x ({x.dtype}) and weight ({weight.dtype}) must have one floating dtype")
    if offs.dtype != torch.int32 or offs.shape != weight.shape[:1] or weight.shape[0] == 0:
        raise ValueError(f"offs ({offs.dtype} {list(offs.shape)}) must be int32 [E] with E = {weight.shape[0]} > 0")


@torch.library.custom_op("workbench_kernels::grouped_mm", mutates_args=(), device_types="cpu")
def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return rows_by_experts(x, weight, offs)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("workbench_kernels::grouped_mm_weight_grad", mutates_args=(), device_types="cpu")
def _grouped_mm_weight_grad(grad: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return rows_by_rows(grad, x, offs)


@_grouped_mm_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], grad.shape[1], x.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offs = ctx.saved_tensors
    grad_x = _grouped_mm(grad, weight.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_mm_weight_grad(grad, x, offs) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_grouped_mm.register_autograd(_backward, setup_context=_save)
