"""Divide every row by its root mean square."""

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import check_devices, resolve, unwatched

MAX_WIDTH = 8_192  # the twin keeps a row in registers; the backward of a wider one spills
MAX_ODD_WIDTH = 4_096
_FEW_NUMBERS = 32_768


class NormedSum(NamedTuple):
    """What was normed, and the sum that it was made of: the residual stream goes on from there."""

    y: Tensor
    total: Tensor


def width_step(width: int) -> int:
    """What the twin's widths are multiples of: a wide row that vector loads cannot read makes the backward spill."""
    return 1 if width <= MAX_ODD_WIDTH else 16


def fits_twin(width: int) -> bool:
    """Whether the Triton twin takes rows of `width` numbers."""
    return width <= MAX_WIDTH and width % width_step(width) == 0


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None, *, impl: str = "auto") -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, impl: str = "auto") -> NormedSum: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: str = "auto"
) -> Tensor | NormedSum:
    """`weight * (x / sqrt(mean(x ** 2) + eps))` over the last axis, of `x + residual` if there is a residual.

    The mean and the division are in float32 or wider; the quotient is rounded to the dtype of `x` before `weight`
    multiplies it, as the published implementations of DeepSeek-V3 do.

    Args:
        x: [..., D].
        weight: [D], of the dtype of `x`.
        eps: added to the mean square.
        residual: of the shape and dtype of `x`; the sum is rounded to that dtype before it is normed.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        What is normed, in the shape and dtype of `x`; with a residual a pair of that and the sum.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    check_devices(x, weight=weight, residual=residual)
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0] or weight.shape[0] == 0:
        raise ValueError(f"x {list(x.shape)} must be [..., D] and weight {list(weight.shape)} [D] with D > 0")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x ({x.dtype}) and weight ({weight.dtype}) must have one floating dtype")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual ({residual.dtype} {list(residual.shape)}) must be as x is ({x.dtype} {list(x.shape)})"
        )
    tier = resolve("rms_norm", impl, x.device, x.dtype, fits=fits_twin(x.shape[-1]))
    if residual is not None:
        if tier == "reference":
            return reference_of_sum(x, residual, weight, eps)
        if tier == "torch" and unwatched(x, weight, residual):
            total = x + residual
            return NormedSum(alone(total, weight, eps), total)
        return NormedSum(*_add_rms_norm(x, residual, weight, eps, tier == "fused")[:2])
    if tier == "reference":
        return reference(x, weight, eps)
    if tier == "torch" and unwatched(x, weight):
        return alone(x, weight, eps)
    return _rms_norm(x, weight, eps, tier == "fused")[0]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, differentiated by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def reference_of_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> NormedSum:
    """The definition with a residual."""
    total = x + residual
    return NormedSum(reference(total, weight, eps), total)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The fast torch form: y [M, D] and 1/rms [M] of x [M, D], in few passes over the rows."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm_M = torch.linalg.vector_norm(wide, dim=1)
    rstd_M = norm_M.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    return torch.mul(wide, rstd_M[:, None], out=torch.empty_like(x)).mul_(weight), rstd_M


def alone(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The fast torch form where nothing is kept for backward: for a few rows every call saved counts."""
    if x.dtype in (torch.float32, torch.float64) and x.numel() <= _FEW_NUMBERS:
        return F.rms_norm(x, weight.shape, weight, eps)
    return forward(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The fast torch form: the sums over a row and over all rows share the product of `grad` and `x`."""
    wide_grad, wide_x, wide_weight = grad.to(rstd.dtype), x.to(rstd.dtype), weight.to(rstd.dtype)
    product_MD = wide_grad * wide_x
    along_M = torch.mv(product_MD, wide_weight).mul_(rstd.pow(3)).div_(-x.shape[1])
    # No second matrix-vector product: over many rows it rounds worse than torch's pairwise sum.
    grad_weight = product_MD.mul_(rstd[:, None]).sum(dim=0)
    # In place to the end: at these sizes a fresh buffer costs more than a pass over a warm one.
    grad_x = torch.mul(wide_grad, wide_weight, out=product_MD).mul_(rstd[:, None]).addcmul_(wide_x, along_M[:, None])
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@torch.library.custom_op("workbench_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor]:
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    if fused:
        from workbench_kernels.fused import rms_norm as twin

        y, rstd = twin.forward(rows, weight, eps)
    else:
        y, rstd = forward(rows, weight, eps)
    return y.view(x.shape), rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=wide)


@torch.library.custom_op("workbench_kernels::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not fused:
        total = x + residual
        y, rstd = forward(total.reshape(-1, x.shape[-1]), weight.contiguous(), eps)
        return y.view(x.shape), total.contiguous(), rstd
    from workbench_kernels.fused import rms_norm as twin

    rows, residual_rows = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, residual))
    y, total, rstd = twin.forward_of_sum(rows, residual_rows, weight.contiguous(), eps)
    return y.view(x.shape), total.view(x.shape), rstd


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=wide)


@torch.library.custom_op("workbench_kernels::rms_norm_grad", mutates_args=())
def _rms_norm_grad(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; what reaches x from elsewhere, `grad_total`, is added to the former."""
    grad_rows, rows = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (grad, x))
    if fused:
        from workbench_kernels.fused import rms_norm as twin

        further = None if grad_total is None else grad_total.reshape(-1, x.shape[-1]).contiguous()
        grad_x, grad_weight = twin.backward(grad_rows, rows, weight.contiguous(), rstd, further)
        return grad_x.view(x.shape), grad_weight
    grad_x, grad_weight = backward(grad_rows, rows, weight, rstd)
    if grad_total is not None:
        grad_x.add_(grad_total.reshape(-1, x.shape[-1]))
    return grad_x.view(x.shape), grad_weight


@_rms_norm_grad.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, float, bool], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    x, weight, rstd = ctx.saved_tensors
    return *_rms_norm_grad(grad, None, x, weight, rstd, ctx.fused), None, None


_rms_norm.register_autograd(_backward, setup_context=_save)


def _save_sum(ctx, inputs: tuple[Tensor, Tensor, Tensor, float, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.fused = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, rstd)


def _backward_of_sum(ctx, grad: Tensor | None, grad_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return grad_total, grad_total, None, None, None
    total, weight, rstd = ctx.saved_tensors
    grad_both, grad_weight = _rms_norm_grad(grad, grad_total, total, weight, rstd, ctx.fused)
    return grad_both, grad_both, grad_weight, None, None


_add_rms_norm.register_autograd(_backward_of_sum, setup_context=_save_sum)
