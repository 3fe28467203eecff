"""Divide every row by its root mean square."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import resolve, unwatched

MAX_WIDTH = 8_192  # the twin keeps a row in registers; the backward of a wider one spills
MAX_ODD_WIDTH = 4_096
_FEW_NUMBERS = 32_768


def width_step(width: int) -> int:
    """What the twin's widths are multiples of: a wide row that vector loads cannot read makes the backward spill."""
    return 1 if width <= MAX_ODD_WIDTH else 16


def fits_twin(width: int) -> bool:
    """Whether the Triton twin takes rows of `width` numbers."""
    return width <= MAX_WIDTH and width % width_step(width) == 0


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """`weight * (x / sqrt(mean(x ** 2) + eps))` over the last axis.

    The mean and the division are in float32 or wider; the quotient is rounded to the dtype of `x` before `weight`
    multiplies it, as the published implementations of DeepSeek-V3 do.

    Args:
        x: [..., D].
        weight: [D], of the dtype of `x`.
        eps: added to the mean square.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0] or weight.shape[0] == 0:
        raise ValueError(f"x {list(x.shape)} must be [..., D] and weight {list(weight.shape)} [D] with D > 0")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x ({x.dtype}) and weight ({weight.dtype}) must have one floating dtype")
    tier = resolve("rms_norm", impl, x.device, x.dtype, fits=fits_twin(x.shape[-1]))
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


@torch.library.custom_op("workbench_kernels::rms_norm_grad", mutates_args=())
def _rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    grad_rows, rows = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (grad, x))
    if fused:
        from workbench_kernels.fused import rms_norm as twin

        grad_x, grad_weight = twin.backward(grad_rows, rows, weight.contiguous(), rstd)
    else:
        grad_x, grad_weight = backward(grad_rows, rows, weight, rstd)
    return grad_x.view(x.shape), grad_weight


@_rms_norm_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, float, bool], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return *_rms_norm_grad(grad, *ctx.saved_tensors, ctx.fused), None, None


_rms_norm.register_autograd(_backward, setup_context=_save)
