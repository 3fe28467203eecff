"""Self-speculative decoding: greedy equals plain greedy, and drawn tokens follow the model's own distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.blocks.multi_token_prediction import MultiTokenPrediction
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.model.sampling import distribution, draw, verify
from workbench.model.speculate import Drafter
from workbench.train.recipes import v3_style

# The 0.999 quantile of chi-square by degrees of freedom.
CRITICAL = {4: 18.47, 26: 54.05}


def make(depths: int, *, vocab_size: int = 17, std: float = 0.4) -> Decoder:
    config = v3_style(
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        vocab_size=vocab_size,
        max_position_embeddings=64,
    )
    config = replace(config, mtp_layers=config.mtp_layers * depths, initializer_range=std)
    torch.manual_seed(0)
    return Decoder(config).double().eval()


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_greedy_is_plain_greedy(depths: int, prompt: int) -> None:
    decoder = make(depths)
    tokens = torch.randint(0, 17, (2, prompt))
    for new in (1, 2, 3, 20):
        plain = generate(decoder, tokens, new)
        drafted = generate(decoder, tokens, new, speculate=True)
        assert torch.equal(drafted.tokens, plain.tokens)
        assert drafted.steps <= 2 * new and len(drafted.acceptance) == depths


def test_a_depth_that_is_right_saves_a_pass_each_time() -> None:
    # With all blocks silent, hidden states say the last token alone; a cycle of tokens is then learned by the head.
    decoder = make(1, vocab_size=8)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                weight.zero_()
        decoder.embed_tokens.weight.copy_(torch.eye(8, 16))
        decoder.lm_head.weight.copy_(torch.eye(8, 16).roll(1, 0))
        # The depth reads the embedding of the newest token and nothing of the hidden state.
        depth = decoder.mtp_layers[0]
        assert isinstance(depth, MultiTokenPrediction)
        depth.eh_proj.weight.copy_(torch.eye(16, 32))
    tokens = torch.tensor([[3]])
    drafted = generate(decoder, tokens, 12, speculate=True)
    assert drafted.tokens[0].tolist() == [(3 + i) % 8 for i in range(13)]
    assert drafted.acceptance == (1.0,)
    # The prompt's pass gives one token, five passes two each, and the last token needs no draft.
    assert drafted.steps == 1 + 5 + 1 and drafted.tokens_per_step == pytest.approx(12 / 7)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


def test_verified_tokens_follow_the_target_over_20000_draws() -> None:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    draft = distribution(torch.randn(2, 5), temperature=0.8, top_p=1.0)
    target = distribution(torch.randn(3, 5), temperature=0.8, top_p=1.0)
    counts = torch.zeros(3, 5)
    for _ in range(20_000):
        drafted = torch.multinomial(draft, 1, generator=draws)[:, 0]
        stands, following = verify(drafted, draft, target, draws)
        for place, token in enumerate([*drafted[:stands].tolist(), int(following)]):
            counts[place, token] += 1
    assert counts[0].sum() == 20_000 and counts[2].sum() > 1_000
    for place in range(3):
        assert chi_square(counts[place], counts[place].sum() * target[place]) < CRITICAL[4]
    # The drafts themselves do not pass for it: the test can tell.
    assert chi_square(counts[0], 20_000 * draft[0]) > 10 * CRITICAL[4]


def test_drafts_from_the_target_all_stand() -> None:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    target = distribution(torch.randn(4, 6), temperature=1.0, top_p=0.9)
    for _ in range(200):
        drafted = torch.multinomial(target[:3], 1, generator=draws)[:, 0]
        assert verify(drafted, target[:3], target, draws)[0] == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 1.0), (1.5, 0.8)])
def test_three_tokens_follow_the_models_joint_distribution(temperature: float, top_p: float) -> None:
    decoder = make(2, vocab_size=3, std=0.6)
    prompt = torch.tensor([[1, 0]])
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    expected = {}
    for words in product(range(3), repeat=3):
        whole = torch.cat((prompt, torch.tensor([words])), dim=1)
        rows = distribution(decoder(whole).logits[0, 1:4], **settings)
        expected[words] = float(rows[range(3), list(words)].prod())
    assert math.isclose(sum(expected.values()), 1.0, rel_tol=1e-9)
    counts = dict.fromkeys(expected, 0)
    trials = 1_500
    for seed in range(trials):
        new = generate(decoder, prompt, 3, speculate=True, seed=seed, **settings).tokens[0, 2:]
        counts[tuple(new.tolist())] += 1
    possible = [words for words, chance in expected.items() if chance > 0]
    assert sum(counts[words] for words in possible) == trials, "nothing outside the nucleus"
    seen = torch.tensor([float(counts[words]) for words in possible])
    assert chi_square(seen, trials * torch.tensor([expected[words] for words in possible])) < CRITICAL[26]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_a_prompt_in_chunks_is_the_same_prompt(chunk: int, speculate: bool) -> None:
    decoder = make(2)
    tokens = torch.randint(0, 17, (1, 11))
    whole = generate(decoder, tokens, 10, speculate=speculate)
    parts = generate(decoder, tokens, 10, speculate=speculate, prefill_chunk=chunk)
    assert torch.equal(parts.tokens, whole.tokens) and parts.steps == whole.steps


def test_what_the_depths_cache_is_what_they_compute_over_the_whole_sequence() -> None:
    decoder = make(2)
    tokens = torch.randint(0, 17, (1, 12))
    drafter, draws = Drafter(decoder, 20), torch.Generator().manual_seed(0)
    output = decoder(tokens)
    for first, last in ((0, 5), (5, 6), (6, 9), (9, 11)):
        drafter.add(output.hidden[:, first:last])
        draft = drafter.draft(tokens[:, : last + 1], 2, temperature=0.0, top_p=1.0, draws=draws)
        # Depth 1 at the last position that is known, depth 2 with the draft of depth 1 in its place.
        guessed = decoder(tokens[:, :last], lookahead=torch.cat((tokens[:, last : last + 1], draft.tokens[:, :1]), 1))
        assert draft.tokens[0, 0] == guessed.mtp_logits[0][0, -1].argmax()
        assert draft.tokens[0, 1] == guessed.mtp_logits[1][0, -1].argmax()
        assert drafter.hidden[1].shape[1] == last and [cache.length for cache in drafter.caches] == [last, last - 1]


def test_caches_forget_and_go_on() -> None:
    decoder = make(1)
    tokens = torch.randint(0, 17, (1, 9))
    cache = decoder.new_cache(1, 9)
    decoder(torch.cat((tokens[:, :5], tokens[:, :3]), dim=1), cache)
    cache.truncate(5)
    torch.testing.assert_close(decoder(tokens[:, 5:], cache).logits, decoder(tokens).logits[:, 5:])
    with pytest.raises(ValueError, match=r"length=10 must lie in 0\.\.9 \(tokens kept\)"):
        cache.truncate(10)


def test_a_model_without_depths_cannot_draft() -> None:
    with pytest.raises(ValueError, match="speculate=True needs a model with mtp_layers"):
        generate(make(0), torch.tensor([[1]]), 2, speculate=True)
    assert draw(torch.tensor([[0.0, 1.0]]), torch.Generator()).item() == 1
