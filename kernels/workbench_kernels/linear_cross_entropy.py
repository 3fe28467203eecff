"""The loss of a vocabulary's logits that never lie in memory all at once.

Letters: N tokens, C tokens of a chunk, K width, V vocabulary; `1` marks a kept axis.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.tier import check_devices, resolve, unwatched

WORKSPACE_BYTES = 512 * 2**20
_CHUNK_ROWS = 256  # on a CPU: more take longer, as their logits leave the caches; fewer, as weight gradients add up


class Terms(NamedTuple):
    """What the loss is made of."""

    ignore_index: int
    label_smoothing: float


class LossAndLse(NamedTuple):
    """The loss, and [N] the logarithm of every token's sum of exponentials, which z-losses are made of."""

    loss: Tensor
    lse: Tensor


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: Literal[True],
    impl: str = "auto",
) -> LossAndLse: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | LossAndLse:
    """Cross-entropy of the logits `input @ linear_weight.T` and `target`, plus `z_loss * logsumexp(logits) ** 2`.

    Only `reference` holds all logits. The other forms take a chunk of tokens at a time, whose size follows from the
    shapes alone, and make its logits again for backward: at most 512 MiB of them, or those of one token. The gradient
    of a 16-bit weight is summed over the chunks in float32, in a tensor of the weight's shape, and rounded once.

    Args:
        input: [N, K] tokens.
        linear_weight: [V, K], of the dtype of `input`.
        target: int64 [N], in 0..V-1 or `ignore_index`.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none".
        ignore_index: tokens with this target have a loss and gradients of zero.
        label_smoothing: in 0..1, the share of the target that is spread evenly over the vocabulary.
        z_loss: at least 0; holds the sum of the exponentials near 1.
        return_lse: return a `LossAndLse`, for those who want the z-loss by itself or another function of it. Both have
            gradients.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        The loss: a scalar, or [N] with reduction "none"; in float32 or wider, from logits that the product rounded to
        the dtype of `input`. The mean over no token is NaN, as in `torch.nn.functional.cross_entropy`, with gradients
        of zero. `lse` is of the same dtype, and 0 where a token is ignored.

    Raises:
        ValueError: shapes, dtypes or options do not fit, or on a CPU a target lies outside 0..V-1. On a GPU, which
            would have to wait for the answer, the fused form makes the loss and the gradients NaN.

    Source: in chunks, Hsu et al., arXiv 2410.10989, section 3.2; label smoothing, Szegedy et al., arXiv 1512.00567,
        section 7; z-loss, Chowdhery et al., arXiv 2204.02311, section 5.
    """
    _check(input, linear_weight, target)
    _check_options(reduction, label_smoothing, z_loss)
    tier = resolve("linear_cross_entropy", impl, input.device, input.dtype)
    if tier == "reference":
        if unwatched(target):
            _check_range(target, linear_weight.shape[0], ignore_index)
        loss_N, lse_N = reference(input, linear_weight, target, ignore_index, label_smoothing)
    elif tier == "torch" and unwatched(input, linear_weight, target):
        loss_N, lse_N = forward(input, linear_weight, target, Terms(ignore_index, label_smoothing))
    else:
        loss_N, lse_N = _linear_cross_entropy(
            input, linear_weight, target, ignore_index, label_smoothing, tier == "fused"
        )
    if z_loss:
        loss_N = loss_N + (z_loss * lse_N.square()).to(loss_N.dtype)
    loss = loss_N
    if reduction != "none":
        loss = loss_N.sum() if reduction == "sum" else loss_N.sum() / (target != ignore_index).sum()
    return LossAndLse(loss, lse_N.to(loss.dtype)) if return_lse else loss


def reference(
    input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> LossAndLse:
    """The definition, with all logits in memory, differentiated by autograd; the loss of every token."""
    logits_NV = F.linear(input, linear_weight).to(torch.promote_types(input.dtype, torch.float32))
    loss_N = F.cross_entropy(
        logits_NV, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return LossAndLse(loss_N, logits_NV.logsumexp(dim=1).masked_fill(target == ignore_index, 0.0))


def forward(input: Tensor, linear_weight: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The fast torch form: the loss of every token [N], and in float64 the logarithm of its sum of exponentials [N].

    In float32 that logarithm would be as inexact as it is large, and so would all probabilities made with it.
    """
    _check_range(target, linear_weight.shape[0], terms.ignore_index)
    wide = torch.promote_types(input.dtype, torch.float32)
    loss_N = input.new_empty(len(input), dtype=wide)
    lse_N = torch.empty_like(loss_N, dtype=torch.float64)
    ignored_N = target == terms.ignore_index
    target_N1 = target.masked_fill(ignored_N, 0)[:, None]
    for rows, _, logits_CV in _logits(input, linear_weight):
        largest_C = logits_CV.amax(dim=1)  # of the logits, which the next line overwrites
        log_softmax_CV = torch.log_softmax(logits_CV, dim=1, out=logits_CV)
        loss_C1 = -log_softmax_CV.gather(1, target_N1[rows])
        lse_N[rows] = largest_C.double() - log_softmax_CV.amax(dim=1)
        if terms.label_smoothing:
            loss_C1.lerp_(-log_softmax_CV.mean(dim=1, keepdim=True), terms.label_smoothing)
        loss_N[rows] = loss_C1.squeeze(1)
    return loss_N.masked_fill_(ignored_N, 0.0), lse_N.masked_fill_(ignored_N, 0.0)


def backward(
    grad: Tensor,
    grad_lse: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    terms: Terms,
    for_input: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The fast torch form: the gradients of input and weight, empty where none is asked for."""
    grad_input, total = gradients(input, linear_weight, for_input, for_weight)
    ignored_N = target == terms.ignore_index
    target_N1 = target.masked_fill(ignored_N, 0)[:, None]
    grad_N1, pull_N1 = (x.to(total.dtype)[:, None] for x in (grad, grad_lse))
    evenly = terms.label_smoothing / len(linear_weight)
    some_ignored = grad.device.type == "cpu" and bool(ignored_N.any())
    for rows, narrow_CV, logits_CV in _logits(input, linear_weight):
        grad_CV = torch.softmax(logits_CV, dim=1, out=logits_CV)
        chosen_C1 = grad_CV.gather(1, target_N1[rows])
        grad_CV.mul_(grad_N1[rows] + pull_N1[rows])
        if evenly:
            grad_CV.sub_(evenly * grad_N1[rows])
        # The one place where large numbers cancel: the pull is added to what is left, and not to what will go.
        left_C1 = (chosen_C1 - (1 - terms.label_smoothing + evenly)) * grad_N1[rows]
        grad_CV.scatter_(1, target_N1[rows], left_C1.addcmul_(pull_N1[rows], chosen_C1))
        tokens_CK = input[rows]
        if some_ignored:  # whose logits may be no numbers
            grad_CV[ignored_N[rows]] = 0.0
            tokens_CK = tokens_CK.masked_fill(ignored_N[rows, None], 0.0)
        if for_weight:
            total.addmm_(grad_CV.t(), tokens_CK.to(total.dtype))
        if for_input:
            torch.mm(narrow_CV.copy_(grad_CV), linear_weight, out=grad_input[rows])
    return grad_input, total.to(linear_weight.dtype)


def gradients(input: Tensor, linear_weight: Tensor, for_input: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradient of input, and zeros in float32 or wider to sum up that of the weight."""
    wide = torch.promote_types(input.dtype, torch.float32)
    grad_input = input.new_empty(input.shape if for_input else 0)
    return grad_input, linear_weight.new_zeros(linear_weight.shape if for_weight else 0, dtype=wide)


def chunks(num_rows: int, row_bytes: int, most: int | None = None) -> list[slice]:
    """Cut the tokens into pieces that the workspace holds, in whole tiles of a matrix product where it holds one."""
    size = WORKSPACE_BYTES // row_bytes
    size = max(1, size - size % 128 if size >= 128 else size)
    size = size if most is None else min(size, most)
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def _logits(input: Tensor, linear_weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens of every chunk, and their logits twice: in the dtype of `input`, and in float32 or wider.

    Both tensors are the caller's to overwrite until the next chunk; they are one where the dtypes are.
    """
    wide = torch.promote_types(input.dtype, torch.float32)
    vocabulary = len(linear_weight)
    row_bytes = vocabulary * (wide.itemsize + (input.dtype.itemsize if input.dtype != wide else 0))
    pieces = chunks(len(input), row_bytes, _CHUNK_ROWS)
    longest = pieces[0].stop if pieces else 0
    narrow = input.new_empty(longest, vocabulary)
    widened = narrow if input.dtype == wide else input.new_empty(longest, vocabulary, dtype=wide)
    for rows in pieces:
        size = rows.stop - rows.start
        narrow_CV, logits_CV = narrow[:size], widened[:size]
        torch.mm(input[rows], linear_weight.t(), out=narrow_CV)
        # Copied first: an operation whose operands differ in dtype is several times slower.
        yield rows, narrow_CV, logits_CV.copy_(narrow_CV)


def _check(input: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    check_devices(input, linear_weight=linear_weight, target=target)
    if input.ndim != 2 or linear_weight.ndim != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            f"input {list(input.shape)} must be [N, K] and linear_weight {list(linear_weight.shape)} [V, K]"
        )
    if linear_weight.shape[0] == 0:
        raise ValueError("linear_weight [0, K] must have a row for every token of a vocabulary, which has at least one")
    if input.dtype != linear_weight.dtype or not input.is_floating_point():
        raise ValueError(
            f"input ({input.dtype}) and linear_weight ({linear_weight.dtype}) must have one floating dtype"
        )
    if target.dtype != torch.int64 or target.shape != input.shape[:1]:
        raise ValueError(f"target ({target.dtype} {list(target.shape)}) must be int64 [N] with N = {input.shape[0]}")


def _check_options(reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in 0..1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")


def _check_range(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse targets on a CPU that name no token of the vocabulary."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    lowest, highest = torch.stack(target.masked_fill(target == ignore_index, 0).aminmax()).tolist()
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"target {wrong} must lie in 0..{vocabulary - 1} or be ignore_index ({ignore_index})")


@torch.library.custom_op("workbench_kernels::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    terms = Terms(ignore_index, label_smoothing)
    if not fused:
        return forward(input, linear_weight, target, terms)
    from workbench_kernels.fused import linear_cross_entropy as twin

    _check_range(target, len(linear_weight), ignore_index)
    return twin.forward(input, linear_weight, target.contiguous(), terms)


@_linear_cross_entropy.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    loss = input.new_empty(input.shape[0], dtype=torch.promote_types(input.dtype, torch.float32))
    return loss, torch.empty_like(loss, dtype=torch.float64)


@torch.library.custom_op("workbench_kernels::linear_cross_entropy_grad", mutates_args=())
def _linear_cross_entropy_grad(
    grad: Tensor,
    grad_lse: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    for_input: bool,
    for_weight: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight, empty where none is asked for: an op cannot return None."""
    terms = Terms(ignore_index, label_smoothing)
    if not fused:
        return backward(grad, grad_lse, input, linear_weight, target, terms, for_input, for_weight)
    from workbench_kernels.fused import linear_cross_entropy as twin

    return twin.backward(grad, grad_lse, input, linear_weight, target.contiguous(), lse, terms, for_input, for_weight)


@_linear_cross_entropy_grad.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    for_input: bool,
    for_weight: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    grad_input = input.new_empty(input.shape if for_input else 0)
    return grad_input, linear_weight.new_empty(linear_weight.shape if for_weight else 0)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, linear_weight, target, *ctx.terms, ctx.fused = inputs
    ctx.set_materialize_grads(False)  # who asks for no `lse` gets no gradient of it in float64
    ctx.save_for_backward(input, linear_weight, target, output[1])


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_lse is None:
        return (None,) * 6
    lse = ctx.saved_tensors[-1]
    grads = (torch.zeros_like(lse) if x is None else x for x in (grad, grad_lse))
    asked = ctx.needs_input_grad[:2]
    found = _linear_cross_entropy_grad(*grads, *ctx.saved_tensors, *ctx.terms, *asked, ctx.fused)
    return *(gradient if wanted else None for gradient, wanted in zip(found, asked, strict=True)), *(None,) * 4


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
