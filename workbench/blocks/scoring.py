"""From a router's logits to scores."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ScoringFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]


def expert_scores(logits: Float[Tensor, "N E"], scoring_func: ScoringFunction) -> Float[Tensor, "N E"]:
    """Scores of every expert, all above 0: `softmax` (V2), `sigmoid` (V3) or `sqrtsoftplus`, sqrt(ln(1 + e^x)) (V4).

    Raises:
        ValueError: `scoring_func` is none of these.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2; DeepSeek-V4,
    arXiv 2606.19348, section 2.1.
    """
    match scoring_func:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        case _:
            raise ValueError(f"scoring_func={scoring_func!r} must be one of softmax, sigmoid, sqrtsoftplus")
