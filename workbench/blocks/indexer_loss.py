"""What the lightning indexer learns from: the attention that it serves."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def indexer_loss(
    index_scores: Float[Tensor, "B T S"], attention: Float[Tensor, "B T S"], selected: Bool[Tensor, "B T S"]
) -> Float[Tensor, ""]:
    """KL(p || softmax(index scores)) over each query's selected keys, in nats; the mean over queries.

    p is `attention`, the weights summed over heads up to any factor, brought to sum 1 over the selected keys; it takes
    no gradient. In the dense warm-up all visible keys are selected; afterwards those that the indexer chose. Our mean
    is the report's sum over queries, divided by their number.

    Source: DeepSeek-V3.2-Exp report, section 2.1, equations 3 (warm-up) and 4 (sparse stage).
    """
    wide = torch.promote_types(attention.dtype, torch.float32)
    target_BTS = attention.detach().to(wide).masked_fill(~selected, 0)
    target_BTS = target_BTS / target_BTS.sum(-1, keepdim=True)
    logits_BTS = index_scores.to(wide).masked_fill(~selected, -torch.inf)
    # Finite again after the softmax: 0 * -inf would be no number.
    log_guess_BTS = logits_BTS.log_softmax(-1).masked_fill(~selected, 0)
    return (torch.xlogy(target_BTS, target_BTS) - target_BTS * log_guess_BTS).sum(-1).mean()
