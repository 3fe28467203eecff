"""Triton twin of `moe_route`: all scores of some tokens in registers, the choice by repeated maxima."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused import expert_tiles
from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.moe_route import MAX_EXPERTS, SMALLEST, fits_twin

TILE = 512  # scores of one program
MIN_BLOCK_E = 32
SMALLEST_SUM = tl.constexpr(SMALLEST)


@dataclass(frozen=True)
class Launch:
    """The tile of one program: tokens and experts."""

    block_n: int
    block_e: int
    num_warps: int = 4


def launch_for(num_experts: int) -> Launch:
    block_e = max(MIN_BLOCK_E, 1 << (num_experts - 1).bit_length())
    return Launch(max(1, TILE // block_e), block_e)


def _chosen(kernel: str, logits: Tensor, active: int) -> Launch:
    experts = logits.shape[1]
    return chosen(launch_for(experts), kernel, logits.device, experts=experts, active=active, bytes=logits.itemsize)


@on_its_device
def forward(
    logits: Tensor,
    bias: Tensor | None,
    num_experts_per_tok: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights, scores, indices and counts."""
    check_dtype(logits.dtype)
    num_tokens, num_experts = logits.shape
    if not fits_twin(num_experts):
        raise ValueError(f"the fused moe_route takes up to {MAX_EXPERTS} experts, not {num_experts}")
    logits = logits.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    indices = logits.new_empty(num_tokens, num_experts_per_tok, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, num_experts_per_tok, dtype=torch.float32)
    scores = logits.new_empty(num_tokens, num_experts, dtype=torch.float32)
    counts = indices.new_zeros(num_experts)
    if num_tokens:
        tile = _chosen("moe_route_fwd_kernel", logits, num_experts_per_tok)
        moe_route_fwd_kernel[(cdiv(num_tokens, tile.block_n),)](
            logits, bias, indices, weights, scores, counts, num_tokens, routed_scaling_factor,
            num_experts, num_experts_per_tok, scoring_func, bias is not None,
            n_group if topk_group < n_group else 1, topk_group, group_score == "top2", norm_topk_prob,
            tile.block_n, tile.block_e, 1 << (n_group - 1).bit_length(), 1 << (num_experts_per_tok - 1).bit_length(),
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return weights, scores, indices, counts


@on_its_device
def backward(
    grad_weights: Tensor,
    grad_scores: Tensor,
    logits: Tensor,
    indices: Tensor,
    scores: Tensor,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Tensor:
    """Return the gradient of the logits, in their dtype."""
    num_tokens, num_experts = logits.shape
    logits = logits.contiguous()
    grad = torch.empty_like(logits)
    if num_tokens:
        tile = _chosen("moe_route_bwd_kernel", logits, indices.shape[1])
        moe_route_bwd_kernel[(cdiv(num_tokens, tile.block_n),)](
            grad_weights.contiguous(), grad_scores.contiguous(), logits, indices, scores, grad,
            num_tokens, routed_scaling_factor, num_experts, indices.shape[1], scoring_func, norm_topk_prob,
            tile.block_n, tile.block_e,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return grad


def cases(kind: str) -> list[Case]:
    """Every tile that the launchers choose, with groups and without, for each way of scoring."""
    shared = {"logits_ptr": f"*{kind}", "indices_ptr": "*i64", "scores_ptr": "*fp32"}
    shared |= {"num_tokens": "i32", "routed_scaling_factor": "fp32"}
    ahead = {"bias_ptr": "*fp32", "weights_ptr": "*fp32", "counts_ptr": "*i64"}
    back = {"grad_weights_ptr": "*fp32", "grad_scores_ptr": "*fp32", "grad_ptr": f"*{kind}"}
    found = []
    block_e = MIN_BLOCK_E
    while block_e <= MAX_EXPERTS:
        tile = launch_for(block_e)
        sizes = {"E": block_e, "A": 8, "BLOCK_N": tile.block_n, "BLOCK_E": block_e}
        for scoring, groups in (("softmax", 1), ("sigmoid", 8), ("sqrtsoftplus", 8)):
            options = {"SCORING": scoring, "NORMALIZED": True}
            grouped = {"HAS_BIAS": True, "J": groups, "KEPT": 4, "TOP2": True, "BLOCK_J": groups, "BLOCK_A": 8}
            name = f"E={block_e} {scoring}"
            constants = sizes | options
            found += [
                Case(
                    *(f"moe_route_fwd_kernel {name}", moe_route_fwd_kernel, shared | ahead),
                    *(constants | grouped, tile.num_warps),
                ),
                Case(f"moe_route_bwd_kernel {name}", moe_route_bwd_kernel, shared | back, constants, tile.num_warps),
            ]
        block_e *= 2
    return found + expert_tiles.cases(kind)


@triton.jit
def moe_route_fwd_kernel(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, scores_ptr, counts_ptr, num_tokens, routed_scaling_factor,
    E: tl.constexpr, A: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    J: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, NORMALIZED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = (token < num_tokens)[:, None] & (expert < E)[None, :]  # [BLOCK_N, BLOCK_E]
    place = token[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    scores = scores_of(logits, SCORING)
    tl.store(scores_ptr + place, scores, mask=inside)

    biased = scores
    if HAS_BIAS:
        biased += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)[None, :]
    biased = tl.where(biased != biased, float("inf"), biased)  # no number counts as the largest, as when sorting
    free = tl.broadcast_to((expert < E)[None, :], [BLOCK_N, BLOCK_E])
    if J > 1:
        group = expert // (E // J)  # [BLOCK_E]
        column = tl.arange(0, BLOCK_J)  # [BLOCK_J]
        group_scores = tl.full([BLOCK_N, BLOCK_J], float("-inf"), tl.float32)
        for j in range(0, J):
            member = free & (group == j)[None, :]
            total = tl.max(tl.where(member, biased, float("-inf")), axis=1)  # [BLOCK_N]
            if TOP2 and E > J:
                first = lowest_index(member & (biased == total[:, None]), expert, BLOCK_E)
                total += tl.max(tl.where(member & (expert[None, :] != first[:, None]), biased, float("-inf")), axis=1)
            group_scores = tl.where((column == j)[None, :], total[:, None], group_scores)
        open_group = tl.broadcast_to((column < J)[None, :], [BLOCK_N, BLOCK_J])
        dropped = free
        for _ in range(0, KEPT):
            total = tl.max(tl.where(open_group, group_scores, float("-inf")), axis=1)
            kept = lowest_index(open_group & (group_scores == total[:, None]), column, BLOCK_J)
            open_group = open_group & (column[None, :] != kept[:, None])
            dropped = dropped & (group[None, :] != kept[:, None])
        biased = tl.where(dropped, float("-inf"), biased)

    slot = tl.arange(0, BLOCK_A)  # [BLOCK_A]
    indices = tl.zeros([BLOCK_N, BLOCK_A], dtype=tl.int32)
    weights = tl.zeros([BLOCK_N, BLOCK_A], dtype=tl.float32)
    for a in range(0, A):
        largest = tl.max(tl.where(free, biased, float("-inf")), axis=1)  # [BLOCK_N]
        chosen = tl.minimum(lowest_index(free & (biased == largest[:, None]), expert, BLOCK_E), E - 1)
        here = expert[None, :] == chosen[:, None]
        free = free & (expert[None, :] != chosen[:, None])
        score = tl.sum(tl.where(here, scores, 0.0), axis=1)
        indices = tl.where((slot == a)[None, :], chosen[:, None], indices)
        weights = tl.where((slot == a)[None, :], score[:, None], weights)
    if NORMALIZED:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + SMALLEST_SUM)
    pair = token[:, None] * A + slot[None, :]
    told = (token < num_tokens)[:, None] & (slot < A)[None, :]
    tl.store(indices_ptr + pair, indices.to(tl.int64), mask=told)
    tl.store(weights_ptr + pair, weights * routed_scaling_factor, mask=told)
    load = tl.sum((inside & (free == 0)).to(tl.int64), axis=0)  # [BLOCK_E]; whole numbers, added in any order
    tl.atomic_add(counts_ptr + expert, load, mask=(expert < E) & (load > 0))


@triton.jit
def moe_route_bwd_kernel(
    grad_weights_ptr, grad_scores_ptr, logits_ptr, indices_ptr, scores_ptr, grad_ptr, num_tokens,
    routed_scaling_factor, E: tl.constexpr, A: tl.constexpr, SCORING: tl.constexpr, NORMALIZED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    known = token < num_tokens
    inside = known[:, None] & (expert < E)[None, :]  # [BLOCK_N, BLOCK_E]
    place = token[:, None] * E + expert[None, :]
    scores = tl.load(scores_ptr + place, mask=inside, other=0.0)
    grad = tl.load(grad_scores_ptr + place, mask=inside, other=0.0)

    total = tl.full([BLOCK_N], 1.0, tl.float32)  # what the weights were divided by
    along = tl.zeros([BLOCK_N], dtype=tl.float32)  # the part of their gradient that dividing removes
    if NORMALIZED:
        total = tl.full([BLOCK_N], SMALLEST_SUM, tl.float32)
        for a in range(0, A):
            chosen = tl.load(indices_ptr + token * A + a, mask=known, other=0).to(tl.int32)
            score = tl.sum(tl.where(expert[None, :] == chosen[:, None], scores, 0.0), axis=1)
            total += score
            along += score * tl.load(grad_weights_ptr + token * A + a, mask=known, other=0.0)
        along = along / total
    for a in range(0, A):
        chosen = tl.load(indices_ptr + token * A + a, mask=known, other=0).to(tl.int32)
        of_weight = tl.load(grad_weights_ptr + token * A + a, mask=known, other=0.0)
        of_score = (of_weight - along) / total * routed_scaling_factor  # [BLOCK_N]
        grad += tl.where(expert[None, :] == chosen[:, None], of_score[:, None], 0.0)

    if SCORING == "softmax":
        grad = scores * (grad - tl.sum(grad * scores, axis=1)[:, None])
    elif SCORING == "sigmoid":
        grad = grad * scores * (1.0 - scores)
    else:
        logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
        # The score of a logit below -100 is 0, and so is its gradient in the limit.
        grad = tl.where(scores > 0.0, grad * tl.sigmoid(logits) / (2.0 * scores), 0.0)
    tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scores_of(logits, SCORING: tl.constexpr):
    """[BLOCK_N, BLOCK_E] scores; those of masked logits, minus infinity, are 0."""
    if SCORING == "softmax":
        raised = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = raised / tl.sum(raised, axis=1)[:, None]
    elif SCORING == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        scores = tl.sqrt(tl.maximum(logits, 0.0) + log1p(tl.exp(-tl.abs(logits))))
    return scores


@triton.jit
def log1p(x):
    """ln(1 + x) for x in [0, 1], exact where 1 + x rounds: the classical correction by the rounded sum."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit
def lowest_index(flags, index, NONE: tl.constexpr):
    """[BLOCK_N], the lowest index of each row where a flag is set."""
    return tl.min(tl.where(flags, index[None, :], NONE), axis=1)
