"""Multiply groups of rows, each by the matrix of its expert."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.expert_tiles import MAX_EXPERTS
from workbench_kernels.gated import GatedActivation
from workbench_kernels.tier import Tier, check_devices, resolve, unwatched


class Options(NamedTuple):
    """What may be done with the rows of a grouped product on their way in and out; see `grouped_mm`."""

    bias: Tensor | None = None
    gather_idx: Tensor | None = None
    scatter_idx: Tensor | None = None
    row_scale: Tensor | None = None
    activation: GatedActivation | None = None
    out_dtype: torch.dtype | None = None


NO_OPTIONS = Options()


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    gather_idx: Tensor | None = None,
    scatter_idx: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: GatedActivation | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`x[start:end] @ weight[e].T` for every expert e; rows at and beyond `offs[-1]` give zeros.

    Args:
        x: [M, K], rows sorted by expert.
        weight: [E, N, K] (experts, out, in), of the dtype of `x`; [E, 2N, K], gate above up, with an activation.
        offs: int32 [E], the inclusive cumulative ends: expert e owns the rows `offs[e - 1]:offs[e]`. On a GPU they are
            not looked at: where they decrease or end beyond M, rows are wrong.
        bias: [E, N] or [E, 2N], of the dtype of `x`; added to the rows of its expert.
        gather_idx: integers [M]: sorted row m is `x[gather_idx[m]]`; x may then have any number of rows.
        scatter_idx: integers [M], each of 0..M-1 once: sorted row m is written to `out[scatter_idx[m]]`.
        row_scale: floating [M]; multiplies sorted row m after bias and activation.
        activation: joins the gate and up products of a row.
        out_dtype: of the result; that of `x` if None.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`. On a GPU the options are part of the
            product where no gradient is recorded, and passes around it where one is.

    Returns:
        [M, N]. The gradient of an expert without rows is exactly zero, and so is that of rows that no expert owns,
        whatever these rows hold.

    Raises:
        ValueError: shapes or dtypes do not fit; on a CPU also: `offs` decreases or ends beyond M.

    Source: the convention of `torch.nn.functional.grouped_mm`, with weights as `nn.Linear` stores them; rows gathered
        and scattered within the product as in Tan et al., arXiv 2403.08245 (ScatterMoE).
    """
    options = Options(bias, gather_idx, scatter_idx, row_scale, activation, out_dtype)
    _check(x, weight, offs)
    _check_options(x, weight, options)
    tier = resolve("grouped_mm", impl, x.device, x.dtype, fits=len(weight) <= MAX_EXPERTS)
    if tier == "reference":
        return reference(x, weight, offs, options)
    if options == NO_OPTIONS:
        return _grouped_mm(x, weight, offs, tier == "fused")
    if tier == "fused" and unwatched(x, weight, bias, row_scale):
        return _in_one_kernel(x, weight, offs, options)
    return _in_passes(x, weight, offs, options, tier)


def reference(x: Tensor, weight: Tensor, offs: Tensor, options: Options = NO_OPTIONS) -> Tensor:
    """The definition: one product per expert, differentiated by autograd."""
    bias, gather_idx, scatter_idx, row_scale, activation, out_dtype = options
    num_rows = len(x) if gather_idx is None else len(gather_idx)
    products = []
    start = 0
    for expert, size in enumerate(group_sizes(offs, num_rows)):
        rows = slice(start, start + size)
        y = F.linear(
            x[rows if gather_idx is None else gather_idx[rows]], weight[expert], None if bias is None else bias[expert]
        )
        y = y if activation is None else activation(*y.chunk(2, dim=-1))
        products.append(y if row_scale is None else y * row_scale[rows, None])
        start += size
    products.append(products[0].new_zeros(num_rows - start, products[0].shape[1]))
    out = torch.cat(products).to(out_dtype or x.dtype)
    return out if scatter_idx is None else torch.empty_like(out).index_copy(0, scatter_idx.long(), out)


def _in_passes(x: Tensor, weight: Tensor, offs: Tensor, options: Options, tier: Tier) -> Tensor:
    """The product and a pass over the rows for every option."""
    bias, gather_idx, scatter_idx, row_scale, activation, out_dtype = options
    num_rows = len(x) if gather_idx is None else len(gather_idx)
    expert = torch.searchsorted(offs, torch.arange(num_rows, dtype=torch.int32, device=x.device), right=True)
    owned = expert < len(offs)
    rows = x if gather_idx is None else _take(x, gather_idx.where(owned, 0))
    y = _grouped_mm(rows, weight, offs, tier == "fused")
    if bias is not None:
        y = y + _take(bias, expert.clamp(max=len(offs) - 1)).where(owned[:, None], 0)
    if activation is not None:
        y = activation(*y.chunk(2, dim=-1))
    if row_scale is not None:
        y = y * row_scale.where(owned, 0)[:, None]
    y = y.to(out_dtype or x.dtype)
    return y if scatter_idx is None else torch.empty_like(y).index_copy(0, scatter_idx.long(), y)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by index, in the form whose gradient adds in a fixed order: another one on each kind of device."""
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def _in_one_kernel(x: Tensor, weight: Tensor, offs: Tensor, options: Options) -> Tensor:
    from workbench_kernels.fused import grouped_mm as twin

    bias, gather_idx, scatter_idx, row_scale, activation, out_dtype = options
    return twin.forward(
        *(x, weight, offs),
        bias=bias,
        gather=gather_idx,
        scatter=scatter_idx,
        row_scale=row_scale,
        activation=activation,
        out_dtype=out_dtype,
    ).out


def rows_by_experts(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The fast torch form of `grouped_mm`: the product alone, outside autograd."""
    groups = group_sizes(offs, x.shape[0])
    owned = sum(groups)
    if _torch_groups(x.dtype, *weight.shape[1:]):
        out = F.grouped_mm(_packed(x), _dense(weight).transpose(1, 2), offs=offs)
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
        return F.grouped_mm(_packed(grad).t(), _packed(x), offs=offs)
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


def _packed(x: Tensor) -> Tensor:
    """Rows at a step of their own width, which torch also demands of a single row, whose step means nothing."""
    return x if x.is_contiguous() and x.stride(0) == x.shape[1] else x.clone(memory_format=torch.contiguous_format)


def _dense(weight: Tensor) -> Tensor:
    return weight if weight.is_contiguous() or weight.transpose(1, 2).is_contiguous() else weight.contiguous()


def _check(x: Tensor, weight: Tensor, offs: Tensor) -> None:
    check_devices(x, weight=weight, offs=offs)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x {list(x.shape)} must be [M, K] and weight {list(weight.shape)} [E, N, K]")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x ({x.dtype}) and weight ({weight.dtype}) must have one floating dtype")
    if offs.dtype != torch.int32 or offs.shape != weight.shape[:1] or weight.shape[0] == 0:
        raise ValueError(f"offs ({offs.dtype} {list(offs.shape)}) must be int32 [E] with E = {weight.shape[0]} > 0")


def _check_options(x: Tensor, weight: Tensor, options: Options) -> None:
    bias, gather_idx, scatter_idx, row_scale, activation, out_dtype = options
    check_devices(x, bias=bias, gather_idx=gather_idx, scatter_idx=scatter_idx, row_scale=row_scale)
    if gather_idx is not None and gather_idx.ndim != 1:
        raise ValueError(f"gather_idx {list(gather_idx.shape)} must have one axis")
    num_rows = len(x) if gather_idx is None else len(gather_idx)
    if len(x) == 0 and num_rows > 0:
        raise ValueError(f"gather_idx names {num_rows} rows and x has none")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype={out_dtype} must be floating")
    if bias is not None and (bias.shape != weight.shape[:2] or bias.dtype != x.dtype):
        raise ValueError(f"bias ({bias.dtype} {list(bias.shape)}) must be {list(weight.shape[:2])} in {x.dtype}")
    for name, index in (("gather_idx", gather_idx), ("scatter_idx", scatter_idx)):
        if index is not None and (index.shape != (num_rows,) or index.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} ({index.dtype} {list(index.shape)}) must be int32 or int64 [M], M = {num_rows}")
    if row_scale is not None and (row_scale.shape != (num_rows,) or not row_scale.is_floating_point()):
        raise ValueError(f"row_scale ({row_scale.dtype} {list(row_scale.shape)}) must be floating [{num_rows}]")
    if activation is not None and weight.shape[1] % 2:
        raise ValueError(f"weight {list(weight.shape)} must be [E, 2N, K] with an activation")


@torch.library.custom_op("workbench_kernels::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, fused: bool) -> Tensor:
    if fused:
        from workbench_kernels.fused import grouped_mm as twin

        return twin.forward(x, weight, offs).out
    return rows_by_experts(x, weight, offs)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor, fused: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("workbench_kernels::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(grad: Tensor, x: Tensor, offs: Tensor, fused: bool) -> Tensor:
    if fused:
        from workbench_kernels.fused import grouped_mm as twin

        return twin.weight_grad(grad, x, offs)[0]
    return rows_by_rows(grad, x, offs)


@_grouped_mm_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, offs: Tensor, fused: bool) -> Tensor:
    return x.new_empty(offs.shape[0], grad.shape[1], x.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.fused = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, offs = ctx.saved_tensors
    grad_x = _grouped_mm(grad, weight.transpose(1, 2), offs, ctx.fused) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_mm_weight_grad(grad, x, offs, ctx.fused) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None


_grouped_mm.register_autograd(_backward, setup_context=_save)
