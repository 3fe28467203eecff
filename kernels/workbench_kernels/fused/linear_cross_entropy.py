"""Triton twin of `linear_cross_entropy`: torch multiplies, the kernels turn logits into losses and gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.linear_cross_entropy import Terms, chunks, gradients

STRIDE_UNIT = 64  # rows of logits begin at multiples of 128 bytes or more, however odd the vocabulary
LOWEST = tl.constexpr(-3.0e38)  # finite, so that the difference of two maxima is never NaN


@dataclass(frozen=True)
class Launch:
    """The logits of one step of a row."""

    block_v: int
    num_warps: int


def launch_for(vocabulary: int) -> Launch:
    """The block of forward and backward alike."""
    return Launch(1_024, 4) if vocabulary <= 1_024 else Launch(4_096, 8)


def _chosen(kernel: str, vocabulary: int, input: Tensor) -> Launch:
    return chosen(launch_for(vocabulary), kernel, input.device, vocabulary=vocabulary, bytes=input.itemsize)


def stride_for(vocabulary: int) -> int:
    """From the logits of one token to those of the next."""
    return cdiv(vocabulary, STRIDE_UNIT) * STRIDE_UNIT


@on_its_device
def forward(input: Tensor, linear_weight: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the loss of every token [N] in float32, and the logarithm of its sum of exponentials [N] in float64.

    Both are 0 for an ignored target, and NaN for one that is not in the vocabulary.
    """
    check_dtype(input.dtype)
    vocabulary = len(linear_weight)
    launch = _chosen("linear_cross_entropy_fwd_kernel", vocabulary, input)
    loss, lse = (input.new_empty(len(input), dtype=dtype) for dtype in (torch.float32, torch.float64))
    for rows, logits in _logits(input, linear_weight):
        linear_cross_entropy_fwd_kernel[(len(logits),)](
            logits, target[rows], loss[rows], lse[rows], *terms, terms.label_smoothing > 0,
            vocabulary, logits.stride(0), launch.block_v,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return loss, lse


@on_its_device
def backward(
    grad: Tensor,
    grad_lse: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    lse: Tensor,
    terms: Terms,
    for_input: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight, empty where none is asked for; those given are [N]."""
    check_dtype(input.dtype)
    grad, grad_lse = (x.to(torch.float32).contiguous() for x in (grad, grad_lse))
    vocabulary = len(linear_weight)
    launch = _chosen("linear_cross_entropy_bwd_kernel", vocabulary, input)
    grad_input, total = gradients(input, linear_weight, for_input, for_weight)
    for rows, logits in _logits(input, linear_weight):
        linear_cross_entropy_bwd_kernel[(len(logits), cdiv(vocabulary, launch.block_v))](
            logits, target[rows], lse[rows], grad[rows], grad_lse[rows], *terms,
            vocabulary, logits.stride(0), launch.block_v,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        if for_weight:
            ignored = (target[rows] == terms.ignore_index)[:, None]
            _add_product(total, logits.t(), input[rows].masked_fill(ignored, 0.0))  # what it holds may be no number
        if for_input:
            torch.mm(logits, linear_weight, out=grad_input[rows])
    return grad_input, total.to(linear_weight.dtype)


def _logits(input: Tensor, linear_weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of every chunk and their logits, which are the caller's to overwrite until the next chunk."""
    vocabulary = len(linear_weight)
    stride = stride_for(vocabulary)
    pieces = chunks(len(input), stride * input.dtype.itemsize)
    workspace = input.new_empty(pieces[0].stop if pieces else 0, stride)
    for rows in pieces:
        logits = workspace[: rows.stop - rows.start, :vocabulary]
        yield rows, torch.mm(input[rows], linear_weight.t(), out=logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`, and round no sum to fewer bits than `total` has."""
    if left.dtype == total.dtype or left.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def cases(kind: str) -> list[Case]:
    """Every block that the launcher chooses: one filled in part; several, of which the last is filled or not."""
    tensors = {"logits_ptr": f"*{kind}", "target_ptr": "*i64", "lse_ptr": "*fp64"}
    tensors |= {"ignore_index": "i32", "label_smoothing": "fp32"}
    found = []
    for vocabulary in (1_000, 50_257, 131_072):
        launch = launch_for(vocabulary)
        shape = {"V": vocabulary, "STRIDE": stride_for(vocabulary), "BLOCK_V": launch.block_v}
        for smoothed in (False, True):
            name = f"linear_cross_entropy_fwd_kernel V={vocabulary}{' smoothed' if smoothed else ''}"
            arguments = tensors | {"loss_ptr": "*fp32"}
            constants = shape | {"SMOOTHED": smoothed}
            found.append(Case(name, linear_cross_entropy_fwd_kernel, arguments, constants, launch.num_warps))
        name = f"linear_cross_entropy_bwd_kernel V={vocabulary}"
        arguments = tensors | {"grad_ptr": "*fp32", "grad_lse_ptr": "*fp32"}
        found.append(Case(name, linear_cross_entropy_bwd_kernel, arguments, shape, launch.num_warps))
    return found


@triton.jit
def linear_cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, ignore_index, label_smoothing,
    SMOOTHED: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * STRIDE
    maximum = LOWEST
    total = 0.0  # of exp(logits - maximum)
    summed = 0.0
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        # By the stride and not by V, so that every load is of whole vectors; what follows the vocabulary is no logit.
        logits = tl.load(row_ptr + column, mask=column < STRIDE, other=0.0).to(tl.float32)  # [BLOCK_V]
        if SMOOTHED:
            summed += tl.sum(tl.where(column < V, logits, 0.0), axis=0)
        logits = tl.where(column < V, logits, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        maximum = higher

    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    named = (target >= 0) & (target < V)
    chosen = tl.load(row_ptr + target, mask=named, other=0.0).to(tl.float32)
    log_total = tl.where(named | ignored, tl.log(total), float("nan"))
    loss = log_total + (maximum - chosen)
    if SMOOTHED:
        loss += label_smoothing * (chosen - summed / V)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, tl.cast(maximum, tl.float64) + log_total))


@triton.jit
def linear_cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, lse_ptr, grad_ptr, grad_lse_ptr, ignore_index, label_smoothing,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    inside = column < STRIDE
    offset = row * STRIDE + column
    target = tl.load(target_ptr + row)
    precise = tl.load(lse_ptr + row)
    lse = precise.to(tl.float32)
    rest = (precise - lse).to(tl.float32)  # what lse has lost to rounding
    grad = tl.load(grad_ptr + row)
    pull = tl.load(grad_lse_ptr + row)

    logits = tl.load(logits_ptr + offset, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_V]
    softmax = tl.exp(logits - lse - rest)
    wanted = tl.where(column == target, 1.0 - label_smoothing, 0.0) + label_smoothing / V
    grad_logits = grad * (softmax - wanted) + pull * softmax
    # Chosen and not multiplied: an ignored token gives zero though its grad is infinite, as that of an empty mean is.
    grad_logits = tl.where(target == ignore_index, 0.0, grad_logits)
    tl.store(logits_ptr + offset, grad_logits.to(logits_ptr.dtype.element_ty), mask=inside)
