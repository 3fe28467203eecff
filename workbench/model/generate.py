"""Continue token sequences, one token at a time, from a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.model.config import require
from workbench.model.decoder import Decoder


class Generation(NamedTuple):
    """`tokens` are the prompt and what was added; `cache_bytes` were measured from the cache's tensors."""

    tokens: Int[Tensor, "B _"]
    cache_bytes: int


@torch.no_grad()
def generate(
    decoder: Decoder,
    tokens: Int[Tensor, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generation:
    """Add `max_new_tokens` tokens to each sequence.

    `temperature=0` takes the likeliest token. Otherwise tokens are drawn from the smallest set of likeliest tokens
    whose probability reaches `top_p`, by a generator of its own, so that the global one is left alone.

    Raises:
        ValueError: an empty prompt, or a number outside its range.
    """
    require(tokens.shape[1] > 0, "the prompt is empty: at least one token is needed")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be above 0")
    require(temperature >= 0, f"temperature={temperature} must be 0 or more")
    require(0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]")
    room = decoder.config.max_position_embeddings - tokens.shape[1]
    require(max_new_tokens <= room, f"max_new_tokens={max_new_tokens} must lie in 1..{room} after this prompt")
    draws = torch.Generator(device=tokens.device).manual_seed(seed)
    cache = decoder.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    new_BT = tokens
    for _ in range(max_new_tokens):
        logits_BV = decoder(new_BT, cache).logits[:, -1]
        new_BT = choose(logits_BV, temperature=temperature, top_p=top_p, draws=draws)
        tokens = torch.cat((tokens, new_BT), dim=1)
    return Generation(tokens, cache.nbytes)


def choose(
    logits: Float[Tensor, "B V"], *, temperature: float, top_p: float, draws: torch.Generator
) -> Int[Tensor, "B 1"]:
    """One token per sequence."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities_BV = nucleus(logits, temperature=temperature, top_p=top_p)
    return torch.multinomial(probabilities_BV, 1, generator=draws)


def nucleus(logits: Float[Tensor, "B V"], *, temperature: float, top_p: float) -> Float[Tensor, "B V"]:
    """Probabilities at `temperature`, restricted to the likeliest tokens that together reach `top_p`, summing to 1.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities_BV = (logits.to(wide) / temperature).softmax(-1)
    if top_p == 1:
        return probabilities_BV
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, 0)
    kept_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)
