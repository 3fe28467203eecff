"""Continue token sequences from a cache, one token at a time or several by drafts."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.model.config import ModelConfig, require
from workbench.model.decoder import Decoder
from workbench.model.sampling import distribution, draw
from workbench.model.speculate import speculate as speak


class Generation(NamedTuple):
    """`tokens` are the prompt and what was added; `cache_bytes` were measured from the tensors of all caches.

    `steps` counts passes of the main model, the prompt as one: `tokens_per_step` is the tokens that a sequence gained
    with each. `acceptance[k-1]` is the share of depth k's drafts that stood, of those whose predecessors stood (NaN
    where there was none; empty without drafts). `seconds` is the time of the whole call.
    """

    tokens: Int[Tensor, "B _"]
    cache_bytes: int
    steps: int
    tokens_per_step: float
    acceptance: tuple[float, ...]
    seconds: float


def generate(
    decoder: Decoder,
    tokens: Int[Tensor, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    speculate: bool = False,
    prefill_chunk: int = 512,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Generation:
    """Add `max_new_tokens` tokens to each sequence.

    `temperature=0` takes the likeliest token. Otherwise tokens are drawn from the smallest set of likeliest tokens
    whose probability reaches `top_p`, by a generator of its own, so that the global one is left alone. The prompt is
    read in chunks of `prefill_chunk` tokens, which bounds the memory that attention over it takes.

    The cache has the dtype of the model or `cache_dtype`, with `torch.float8_e4m3fn` for latents in FP8 beside scales.

    `speculate` lets the model's prediction depths draft, and the main model verify all drafts in one pass: tokens
    follow the same distribution, though not the same draws, in fewer passes. Sequences of a batch, of which each
    accepts other drafts, are then continued one after the other.

    Raises:
        ValueError: an empty prompt, a number outside its range, or `speculate` of a model without prediction depths or
            one with sliding windows.
    """
    require(tokens.shape[1] > 0, "the prompt is empty: at least one token is needed")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be above 0")
    require(temperature >= 0, f"temperature={temperature} must be 0 or more")
    require(0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]")
    require(prefill_chunk > 0, f"prefill_chunk={prefill_chunk} must be above 0")
    require(not speculate or len(decoder.mtp_layers) > 0, "speculate=True needs a model with mtp_layers")
    if speculate:
        refuse_lost_past(decoder.config)
    room = decoder.config.max_position_embeddings - tokens.shape[1]
    require(max_new_tokens <= room, f"max_new_tokens={max_new_tokens} must lie in 1..{room} after this prompt")
    draws = torch.Generator(device=tokens.device).manual_seed(seed)
    settings = {"temperature": temperature, "top_p": top_p, "prefill_chunk": prefill_chunk}
    settings |= {"cache_dtype": cache_dtype, "draws": draws}
    began = time.perf_counter()
    if not speculate:
        longer, cache_bytes = continue_plainly(decoder, tokens, max_new_tokens, **settings)
        return Generation(longer.clone(), cache_bytes, max_new_tokens, 1.0, (), time.perf_counter() - began)
    with torch.inference_mode():
        spoken = [speak(decoder, row[None], max_new_tokens, **settings) for row in tokens]
    steps = sum(one.steps for one in spoken)
    drafted_M = torch.stack([one.drafted for one in spoken]).sum(0)
    accepted_M = torch.stack([one.accepted for one in spoken]).sum(0)
    return Generation(
        torch.cat([one.tokens for one in spoken]),
        max(one.cache_bytes for one in spoken),
        steps,
        len(spoken) * max_new_tokens / steps,
        tuple((accepted_M / drafted_M).tolist()),
        time.perf_counter() - began,
    )


def refuse_lost_past(config: ModelConfig) -> None:
    """Raise `ValueError` if a cache drops or pools its past, so that a draft that fell could not be taken back."""
    attentions = [layer.attention for layer in (*config.layers, *config.mtp_layers)]
    losing = [type(x).__name__ for x in attentions if getattr(x, "sliding_window", None) is not None]
    require(not losing, f"speculate=True takes drafts back; {losing[:1]} with a sliding_window cannot")


@torch.inference_mode()
def continue_plainly(
    decoder: Decoder,
    tokens: Int[Tensor, "B T"],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    prefill_chunk: int,
    cache_dtype: torch.dtype | None,
    draws: torch.Generator,
) -> tuple[Int[Tensor, "B _"], int]:
    """The sequences with one token per pass added, and the bytes of the cache."""
    cache = decoder.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens, cache_dtype)
    *chunks, new_BT = tokens.split(prefill_chunk, dim=1)
    for chunk in chunks:
        decoder(chunk, cache)
    for _ in range(max_new_tokens):
        logits_BV = decoder(new_BT, cache).logits[:, -1]
        new_BT = draw(distribution(logits_BV, temperature=temperature, top_p=top_p), draws)
        tokens = torch.cat((tokens, new_BT), dim=1)
    return tokens, cache.nbytes
