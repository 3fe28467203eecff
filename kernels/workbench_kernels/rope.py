"""Turn pairs of numbers by the angle of their position.

Letters: B sequences, T positions, H heads, R numbers of a head, P = R / 2 pairs.
"""

import torch
from torch import Tensor

from workbench_kernels.tier import check_devices, resolve, unwatched

MAX_WIDTH = 1_024  # the twin keeps a head in registers


def fits_twin(width: int) -> bool:
    """Whether the Triton twin takes heads of `width` numbers."""
    return width <= MAX_WIDTH


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, impl: str = "auto") -> Tensor:
    """Every pair (a, b) becomes (a cos - b sin, b cos + a sin), in float32 or wider, rounded once.

    Args:
        x: [B, T, H, R].
        cos, sin: [T, R / 2], of one floating dtype; no gradient reaches them.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... (DeepSeek); otherwise number i pairs with number R/2 + i
            (Llama). The two are different functions of the same weights.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        [B, T, H, R] in the dtype of `x`. The way back is the same with `-sin`.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: Su et al., arXiv 2104.09864, section 3.4.2.
    """
    _check(x, cos, sin)
    cos, sin = (part.detach() if part.requires_grad else part for part in (cos, sin))
    tier = resolve("rope", impl, x.device, x.dtype, fits=fits_twin(x.shape[-1]))
    if x.numel() == 0:
        return x.clone()
    if tier == "reference":
        return reference(x, cos, sin, interleaved=interleaved)
    if tier == "torch" and unwatched(x, cos, sin):
        return forward(x, cos, sin, interleaved)
    return _rope(x, cos, sin, interleaved, tier == "fused")


def reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """The definition, differentiated by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos_T1P, sin_T1P = (part.to(wide).unsqueeze(1) for part in (cos, sin))
    pairs = x.to(wide).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = (first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P)
    return torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2).to(x.dtype)


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The fast torch form: neighbours are the parts of a complex number, which one product turns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos_T1P, sin_T1P = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    if interleaved:
        turned = torch.view_as_complex(_in_pairs(x.to(wide))) * torch.complex(cos_T1P, sin_T1P)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    # Whole heads at a time: passes over halves are shorter runs of memory, and more of them.
    x_wide = x.to(wide)
    first, second = x_wide.chunk(2, dim=-1)
    cos_T1R, sin_T1R = torch.cat((cos_T1P, cos_T1P), dim=-1), torch.cat((-sin_T1P, sin_T1P), dim=-1)
    return (x_wide * cos_T1R).addcmul_(torch.cat((second, first), dim=-1), sin_T1R).to(x.dtype)


def _in_pairs(x: Tensor) -> Tensor:
    """[..., R/2, 2], copied only where pairs do not begin at even places, which complex numbers ask for."""
    steps = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(step % 2 for step in steps):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.unflatten(-1, (-1, 2))


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_devices(x, cos=cos, sin=sin)
    shapes = f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"{shapes}: x must be [B, T, H, R] with R even")
    if cos.shape != (x.shape[1], x.shape[3] // 2) or sin.shape != cos.shape:
        raise ValueError(f"{shapes}: cos and sin must be [T, R / 2]")
    if not x.is_floating_point() or not cos.is_floating_point() or cos.dtype != sin.dtype:
        raise ValueError(f"x ({x.dtype}), cos ({cos.dtype}) and sin ({sin.dtype}) must be floating, the last two alike")


@torch.library.custom_op("workbench_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, fused: bool) -> Tensor:
    if fused:
        from workbench_kernels.fused import rope as twin

        return twin.forward(x, cos, sin, interleaved)
    return forward(x, cos, sin, interleaved).contiguous()


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, fused: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.fused = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _rope(grad, cos, -sin, ctx.interleaved, ctx.fused), None, None, None, None


_rope.register_autograd(_backward, setup_context=_save)
