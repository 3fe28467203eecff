"""Keeping experts and devices equally busy: auxiliary losses, or a bias update without any loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.blocks.router import Routing


def balance_loss(routing: Routing, num_sequences: int) -> Float[Tensor, ""]:
    """E * sum over experts of (share of choices) * (mean normalised score), within each sequence, then averaged.

    The N tokens of `routing` are `num_sequences` sequences of equal length; 1 judges the whole batch at once. Exactly 1
    at perfect balance, whatever the number of experts, choices and tokens. Scores are normalised over all experts
    first, so that sigmoid scores count like probabilities. Shares carry no gradient. We count the choices that the
    router made; V3's text counts the best unbiased scores, without groups.

    Source, both without their coefficient: DeepSeek-V2, arXiv 2405.04434, section 2.2.3, equation 23 (per batch);
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2, equations 17 to 20 (per sequence).
    """
    num_experts = routing.scores.shape[-1]
    shares_BE = choice_counts(routing.indices.unflatten(0, (num_sequences, -1)), num_experts).to(routing.scores.dtype)
    shares_BE = shares_BE / shares_BE.sum(-1, keepdim=True)
    normalised_NE = routing.scores / routing.scores.sum(-1, keepdim=True)
    mean_scores_BE = normalised_NE.unflatten(0, (num_sequences, -1)).mean(1)
    return num_experts * (shares_BE * mean_scores_BE).sum(-1).mean()


def device_loss(routing: Routing, num_devices: int) -> Float[Tensor, ""]:
    """Sum over devices of (choices per expert, 1 at balance) * (summed mean score), the batch judged at once.

    Each of `num_devices` devices holds an equal run of consecutive experts. Exactly 1 when devices are equally busy,
    however unevenly the experts within each are. Without its coefficient (0.05 in V2).

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.3, equations 26 to 28.

    Raises:
        ValueError: `num_devices` does not divide the experts.
    """
    scores_G = device_scores(routing, num_devices)
    choices_G = routing.load.unflatten(0, (num_devices, -1)).sum(-1).to(scores_G.dtype)
    return (num_devices * choices_G / choices_G.sum() * scores_G).sum()


def communication_loss(routing: Routing, num_devices: int, *, devices_per_token: int) -> Float[Tensor, ""]:
    """Sum over devices of (share of tokens sent there) * (summed mean score), the batch judged at once.

    A token that visits several experts of a device is sent there once. `devices_per_token` is the most that a token
    may be sent to (`topk_group`); exactly 1 when every token uses all of these and devices are equally busy. Without
    its coefficient (0.02 in V2).

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.3, equations 29 to 31.

    Raises:
        ValueError: `num_devices` does not divide the experts, or `devices_per_token` is not in 1..`num_devices`.
    """
    if not 1 <= devices_per_token <= num_devices:
        raise ValueError(f"devices_per_token={devices_per_token} must lie in 1..{num_devices} (num_devices)")
    scores_G = device_scores(routing, num_devices)
    device_NA = routing.indices // (routing.scores.shape[-1] // num_devices)
    sent_NG = torch.zeros(device_NA.shape[0], num_devices, dtype=scores_G.dtype, device=scores_G.device)
    share_G = sent_NG.scatter(1, device_NA, 1).mean(0) / devices_per_token
    return (num_devices * share_G * scores_G).sum()


def device_scores(routing: Routing, num_devices: int) -> Float[Tensor, " G"]:
    """Mean normalised score of every expert, summed over the experts of each device; sums to 1."""
    num_experts = routing.scores.shape[-1]
    if num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"num_devices={num_devices} must divide the {num_experts} experts")
    normalised_NE = routing.scores / routing.scores.sum(-1, keepdim=True)
    return normalised_NE.mean(0).unflatten(0, (num_devices, -1)).sum(-1)


def choice_counts(indices: Int[Tensor, "B T A"], num_experts: int) -> Int[Tensor, "B E"]:
    """How often each expert was chosen within each sequence."""
    flat_BX = indices.flatten(1)
    counts_BE = torch.zeros(flat_BX.shape[0], num_experts, dtype=torch.int64, device=flat_BX.device)
    return counts_BE.scatter_add_(1, flat_BX, torch.ones_like(flat_BX))


@torch.no_grad()
def updated_bias(
    bias: Float[Tensor, " E"], load: Int[Tensor, " E"], *, speed: float, centred: bool = False
) -> Float[Tensor, " E"]:
    """The selection bias after one batch: up by `speed` for every underloaded expert, down for every overloaded one.

    `load` counts choices over the whole batch (all accumulation steps, all devices). `centred` subtracts the mean of
    the move, which keeps the bias from drifting and changes no choice; DeepSeek's text has the plain form.

    Source: Wang et al., arXiv 2408.15664, algorithm 1.
    """
    wide = load.to(bias.dtype)
    move_E = torch.sign(wide.mean() - wide) * speed
    return bias + (move_E - move_E.mean() if centred else move_E)
