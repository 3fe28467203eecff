"""From a router's logits to the experts of every token, and to the order in which they compute.

Letters: N tokens, E experts, A experts per token, J groups of experts, I experts of a group, P pairs (token, slot).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.expert_tiles import ExpertOrder, expert_order
from workbench_kernels.tier import check_devices, resolve

ScoringFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["max", "top2"]

MAX_EXPERTS = 1_024  # the twin keeps a token's scores in registers
SMALLEST = 1e-20  # added to a sum that weights are divided by


class MoeRouting(NamedTuple):
    """What each of N tokens chose, and the order of the pairs by expert, if it was asked for."""

    indices: Tensor  # int64 [N, A], best first
    weights: Tensor  # [N, A], float32 or wider
    scores: Tensor  # [N, E], unbiased
    counts: Tensor  # int64 [E], tokens that chose each expert
    order: ExpertOrder | None


def fits_twin(num_experts: int) -> bool:
    """Whether the Triton twin takes that many experts."""
    return num_experts <= MAX_EXPERTS


def moe_route(
    logits: Tensor,
    num_experts_per_tok: int,
    *,
    scoring_func: ScoringFunction,
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore = "top2",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    tile_rows: int | None = None,
    impl: str = "auto",
) -> MoeRouting:
    """Choose the experts with the best biased scores, of equals the lowest index; weigh them by the unbiased scores.

    Args:
        logits: [N, E].
        num_experts_per_tok: A, in 1..E, and no more than the experts of the groups that are kept.
        scoring_func: "softmax" over the experts, "sigmoid" of each, or "sqrtsoftplus", sqrt(ln(1 + e^x)).
        bias: [E], floating; moves the choice and never the weights, and takes no gradient.
        n_group: the E experts are this many groups, one after the other.
        topk_group: a token keeps this many groups, and chooses among their experts.
        group_score: what a group is judged by: its best biased score ("max"), or the sum of its best two ("top2").
        norm_topk_prob: divide the weights of a token by their sum.
        routed_scaling_factor: multiplies the weights.
        tile_rows: sort the pairs by expert as well, and cut every expert's rows into tiles of this many: see
            `expert_order`. None leaves that out.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        `indices` int64 [N, A], best first; `weights` [N, A] and `scores` [N, E], float32 or wider; `counts` int64 [E];
        `order`. Gradients reach `logits` through weights and scores. Nothing waits for the device.

    Raises:
        ValueError: shapes or numbers do not fit.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; DeepSeek-V2, arXiv 2405.04434, section 2.2; DeepSeek-V4,
        arXiv 2606.19348, section 2.1 (sqrtsoftplus).
    """
    _check(logits, num_experts_per_tok, bias, n_group, topk_group)
    if scoring_func not in get_args(ScoringFunction):
        raise ValueError(f"scoring_func={scoring_func!r} must be one of softmax, sigmoid, sqrtsoftplus")
    if group_score not in get_args(GroupScore):
        raise ValueError(f"group_score={group_score!r} must be max or top2")
    if tile_rows is not None and tile_rows < 1:
        raise ValueError(f"tile_rows={tile_rows} must be at least 1")
    options = (scoring_func, n_group, topk_group, group_score, norm_topk_prob, routed_scaling_factor)
    tier = resolve("moe_route", impl, logits.device, logits.dtype, fits=fits_twin(logits.shape[1]))
    if tier == "fused":
        weights, scores, indices, counts = _moe_route(logits, bias, num_experts_per_tok, *options)
    else:
        weights, scores, indices, counts = reference(logits, bias, num_experts_per_tok, *options)
    order = None
    if tile_rows is not None:
        order = expert_order(indices, logits.shape[1], tile_rows=tile_rows, fused=tier == "fused")
    return MoeRouting(indices, weights, scores, counts, order)


def reference(
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
    """The definition, differentiated by autograd: weights, scores, indices and counts."""
    scores_NE = expert_scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), scoring_func)
    biased_NE = scores_NE.detach() if bias is None else scores_NE.detach() + bias.detach()
    if topk_group < n_group:
        biased_NE = mask_groups(biased_NE, n_group, topk_group, 2 if group_score == "top2" else 1)
    indices_NA = best(biased_NE, num_experts_per_tok)
    weights_NA = scores_NE.gather(1, indices_NA)
    if norm_topk_prob:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + SMALLEST)
    counts_E = indices_NA.new_zeros(logits.shape[1])
    counts_E.scatter_add_(0, indices_NA.flatten(), torch.ones_like(indices_NA).flatten())
    return weights_NA * routed_scaling_factor, scores_NE, indices_NA, counts_E


def expert_scores(logits: Tensor, scoring_func: str) -> Tensor:
    """Scores of every expert, all above 0: `softmax` (V2), `sigmoid` (V3) or `sqrtsoftplus` (V4).

    Raises:
        ValueError: `scoring_func` is none of these.
    """
    match scoring_func:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "sqrtsoftplus":
            softplus = F.softplus(logits)
            is_zero = softplus == 0  # where the slope of a root is infinite
            return softplus.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)
        case _:
            raise ValueError(f"scoring_func={scoring_func!r} must be one of softmax, sigmoid, sqrtsoftplus")


def mask_groups(biased_NE: Tensor, n_group: int, topk_group: int, judged_by: int) -> Tensor:
    """Set the scores outside each token's best groups to minus infinity: a biased score may be below 0."""
    biased_NJI = biased_NE.unflatten(-1, (n_group, -1))
    group_scores_NJ = biased_NJI.topk(min(judged_by, biased_NJI.shape[-1]), dim=-1).values.sum(-1)
    kept_NA = best(group_scores_NJ, topk_group)
    dropped_NJ = torch.ones_like(group_scores_NJ, dtype=torch.bool).scatter(1, kept_NA, False)
    return biased_NJI.masked_fill(dropped_NJ.unsqueeze(-1), -torch.inf).flatten(-2)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last axis, largest first; of equals the lowest, on every device."""
    if scores.device.type != "cpu":  # where torch sorts a NaN whose sign is set as if it were the lowest
        scores = scores.masked_fill(scores.isnan(), torch.nan)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _check(logits: Tensor, num_experts_per_tok: int, bias: Tensor | None, n_group: int, topk_group: int) -> None:
    check_devices(logits, bias=bias)
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits ({logits.dtype} {list(logits.shape)}) must be floating [N, E] with E > 0")
    num_experts = logits.shape[1]
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"n_group={n_group} must divide the {num_experts} experts")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group} must lie in 1..{n_group} (n_group)")
    most = num_experts // n_group * topk_group
    if not 1 <= num_experts_per_tok <= most:
        raise ValueError(f"num_experts_per_tok={num_experts_per_tok} must lie in 1..{most} (experts of kept groups)")
    if bias is not None and (bias.shape != (num_experts,) or not bias.is_floating_point()):
        raise ValueError(f"bias ({bias.dtype} {list(bias.shape)}) must be floating [{num_experts}]")


@torch.library.custom_op("workbench_kernels::moe_route", mutates_args=())
def _moe_route(
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
    from workbench_kernels.fused import moe_route as twin

    return twin.forward(
        logits,
        bias,
        num_experts_per_tok,
        scoring_func,
        n_group,
        topk_group,
        group_score,
        norm_topk_prob,
        routed_scaling_factor,
    )


@_moe_route.register_fake
def _(logits: Tensor, bias: Tensor | None, num_experts_per_tok: int, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, num_experts_per_tok, dtype=torch.float32),
        logits.new_empty(num_tokens, num_experts, dtype=torch.float32),
        logits.new_empty(num_tokens, num_experts_per_tok, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int64),
    )


@torch.library.custom_op("workbench_kernels::moe_route_grad", mutates_args=())
def _moe_route_grad(
    grad_weights: Tensor,
    grad_scores: Tensor,
    logits: Tensor,
    indices: Tensor,
    scores: Tensor,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Tensor:
    from workbench_kernels.fused import moe_route as twin

    return twin.backward(
        grad_weights, grad_scores, logits, indices, scores, scoring_func, norm_topk_prob, routed_scaling_factor
    )


@_moe_route_grad.register_fake
def _(grad_weights: Tensor, grad_scores: Tensor, logits: Tensor, *_) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.scoring_func, _, _, _, ctx.norm_topk_prob, ctx.routed_scaling_factor = inputs
    _, scores, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.set_materialize_grads(False)  # otherwise whole numbers get gradients of zeros
    ctx.save_for_backward(logits, indices, scores)


def _backward(ctx, grad_weights: Tensor | None, grad_scores: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_weights is None and grad_scores is None:
        return (None,) * 9
    logits, indices, scores = ctx.saved_tensors
    grad_weights = scores.new_zeros(indices.shape) if grad_weights is None else grad_weights
    grad_scores = torch.zeros_like(scores) if grad_scores is None else grad_scores
    options = ctx.scoring_func, ctx.norm_topk_prob, ctx.routed_scaling_factor
    return (_moe_route_grad(grad_weights, grad_scores, logits, indices, scores, *options), *(None,) * 8)


_moe_route.register_autograd(_backward, setup_context=_save)
