"""Self-speculative decoding: the prediction depths draft, one pass of the main model verifies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.blocks.rope import Rotation
from workbench.model.decoder import Decoder
from workbench.model.sampling import distribution, draw, verify


class Draft(NamedTuple):
    """The drafted tokens, and the distribution that each was drawn from."""

    tokens: Int[Tensor, "1 M"]
    probabilities: Float[Tensor, "M V"]


class Drafter:
    """The prediction depths of a decoder over one sequence, each with a cache and the hidden states it gave so far.

    Depth k at position i reads its predecessor's hidden state there and token i+k. What was computed from a drafted
    token is forgotten after the draft, and computed again from the token that came to stand.
    """

    def __init__(self, decoder: Decoder, max_length: int, cache_dtype: torch.dtype | None = None) -> None:
        self.decoder = decoder
        self.caches = decoder.new_mtp_caches(1, max_length, cache_dtype)
        # Entry 0 is the main model's, entry k that of depth k.
        empty_BTD = decoder.embed_tokens.weight.new_empty(1, 0, decoder.config.hidden_size)
        self.hidden = [empty_BTD] * (1 + len(self.caches))

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of all depths' caches occupy."""
        return sum(cache.nbytes for cache in self.caches)

    def add(self, hidden: Float[Tensor, "1 T D"]) -> None:
        """Take the main model's hidden states of the next T positions."""
        self.hidden[0] = torch.cat((self.hidden[0], hidden), dim=1)

    def draft(
        self, tokens: Int[Tensor, "1 S"], count: int, *, temperature: float, top_p: float, draws: torch.Generator
    ) -> Draft:
        """Guess the `count` tokens that follow `tokens`, whose last one the main model has not read yet."""
        known = tokens.shape[1]
        end = known - 1  # positions that the main model has read
        rows: list[Tensor] = []
        turns = self.decoder.rotations(torch.arange(end, device=tokens.device))
        for depth in range(1, count + 1):
            layer, cache = self.decoder.mtp_layers[depth - 1], self.caches[depth - 1]
            first = cache.length
            turn = turns[len(self.decoder.layers) + depth - 1]
            hidden_BTD = layer(
                self.hidden[depth - 1][:, first:end],
                self.decoder.embed_tokens(tokens[:, first + depth : end + depth]),
                Rotation(*(part[first:] for part in turn)),
                cache,
            ).hidden
            self.hidden[depth] = torch.cat((self.hidden[depth][:, :first], hidden_BTD), dim=1)
            logits_BV = self.decoder.lm_head(hidden_BTD[:, -1])
            rows.append(distribution(logits_BV, temperature=temperature, top_p=top_p))
            tokens = torch.cat((tokens, draw(rows[-1], draws)), dim=1)
        for depth in range(1, count + 1):
            self.caches[depth - 1].truncate(max(0, known - depth))
        return Draft(tokens[:, known:], torch.cat(rows))


class Spoken(NamedTuple):
    """A sequence with what was added, passes of the main model, and how many tokens each depth drafted and kept."""

    tokens: Int[Tensor, "1 _"]
    steps: int
    drafted: Int[Tensor, " M"]
    accepted: Int[Tensor, " M"]
    cache_bytes: int


def speculate(
    decoder: Decoder,
    tokens: Int[Tensor, "1 S"],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    prefill_chunk: int,
    cache_dtype: torch.dtype | None,
    draws: torch.Generator,
) -> Spoken:
    """Add `max_new_tokens` tokens to one sequence, distributed exactly as without drafts."""
    goal = tokens.shape[1] + max_new_tokens
    cache, drafter = decoder.new_cache(1, goal, cache_dtype), Drafter(decoder, goal, cache_dtype)
    depths = len(drafter.caches)
    drafted_M, accepted_M = torch.zeros(depths, dtype=torch.int64), torch.zeros(depths, dtype=torch.int64)
    for chunk in tokens.split(prefill_chunk, dim=1):
        output = decoder(chunk, cache)
        drafter.add(output.hidden)
    first_BV = distribution(output.logits[:, -1], temperature=temperature, top_p=top_p)
    tokens, steps = torch.cat((tokens, draw(first_BV, draws)), dim=1), 1
    while tokens.shape[1] < goal:
        count = min(depths, goal - tokens.shape[1] - 1)
        read = cache.length
        draft = Draft(tokens[:, :0], first_BV[:0])
        if count:
            draft = drafter.draft(tokens, count, temperature=temperature, top_p=top_p, draws=draws)
        output = decoder(torch.cat((tokens[:, -1:], draft.tokens), dim=1), cache)
        target_MV = distribution(output.logits[0], temperature=temperature, top_p=top_p)
        stands, following = verify(draft.tokens[0], draft.probabilities, target_MV, draws)
        drafted_M[: min(count, stands + 1)] += 1
        accepted_M[:stands] += 1
        cache.truncate(read + 1 + stands)
        drafter.add(output.hidden[:, : 1 + stands])
        tokens, steps = torch.cat((tokens, draft.tokens[:, :stands], following.view(1, 1)), dim=1), steps + 1
    return Spoken(tokens, steps, drafted_M, accepted_M, cache.nbytes + drafter.nbytes)
