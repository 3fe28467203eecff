"""From logits to the distribution that tokens are drawn from, and from a draft to one that it cannot change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def distribution(logits: Float[Tensor, "*B V"], *, temperature: float, top_p: float) -> Float[Tensor, "*B V"]:
    """Probabilities at `temperature`, restricted to the likeliest tokens that together reach `top_p`, summing to 1.

    At `temperature=0` all of it lies on the likeliest token; of equals, on the first.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(wide)
    probabilities_BV = (logits.to(wide) / temperature).softmax(-1)
    if top_p == 1:
        return probabilities_BV
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, 0)
    kept_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)


def draw(probabilities: Float[Tensor, "B V"], draws: torch.Generator) -> Int[Tensor, "B 1"]:
    """One token per row."""
    return torch.multinomial(probabilities, 1, generator=draws)


def verify(
    drafted: Int[Tensor, " M"],
    draft: Float[Tensor, "M V"],
    target: Float[Tensor, "M+1 V"],
    draws: torch.Generator,
) -> tuple[int, Int[Tensor, ""]]:
    """How many drafted tokens stand, and the token that follows them; together they are distributed as by `target`.

    `draft[j]` is the distribution that `drafted[j]` was drawn from, `target[j]` that of the model at its place, and
    `target[M]` that of the token after all. A token stands with probability min(1, target / draft); the first that does
    not is replaced by a draw from the positive part of target - draft.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318.
    """
    chances_M = torch.rand(len(drafted), generator=draws, device=target.device, dtype=target.dtype)
    for place, token in enumerate(drafted.tolist()):
        if chances_M[place] * draft[place, token] < target[place, token]:
            continue
        rest_V = (target[place] - draft[place]).clamp(min=0)
        # Empty only where rounding alone told two equal distributions apart.
        rest_V = rest_V if rest_V.sum() > 0 else target[place]
        return place, draw(rest_V[None], draws)[0, 0]
    return len(drafted), draw(target[-1:], draws)[0, 0]
