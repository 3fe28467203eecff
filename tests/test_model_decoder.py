"""The decoder as a whole: causality, caches, further depths, initial weights, generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from workbench.model import count
from workbench.model.config import (
    DenseFeedForward,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    Yarn,
)
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.model.initial import initialize
from workbench.model.sampling import distribution
from workbench.train.recipes import small_v3, toy_v3

LATENT = LatentAttention(
    num_attention_heads=3, q_lora_rank=None, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6
)
GROUPED = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=6)
DENSE = DenseFeedForward(intermediate_size=33)
SPARSE = MixtureOfExperts(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=11, n_shared_experts=1)
SOFTMAX = MixtureOfExperts(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=10,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    norm_topk_prob=False,
)
MODELS = {
    "V3 in small": tiny_recipe().model,
    "mixed layers, two depths": ModelConfig(
        vocab_size=41,
        hidden_size=24,
        layers=(LayerConfig(GROUPED, DENSE), LayerConfig(LATENT, SPARSE), LayerConfig(GROUPED, SOFTMAX)),
        mtp_layers=(LayerConfig(LATENT, SPARSE), LayerConfig(GROUPED, DENSE)),
        max_position_embeddings=64,
    ),
    "tied, stretched": ModelConfig(
        vocab_size=41,
        hidden_size=24,
        layers=(
            LayerConfig(
                replace(
                    LATENT, rope=Rope(scaling=Yarn(factor=4.0, original_max_position_embeddings=8, mscale_all_dim=1.0))
                ),
                SPARSE,
            ),
        ),
        tie_word_embeddings=True,
    ),
}


def make(name: str) -> tuple[Decoder, torch.Tensor]:
    torch.manual_seed(0)
    decoder = Decoder(replace(MODELS[name], initializer_range=0.3)).double().eval()
    return decoder, torch.randint(0, 41, (2, 20))


@pytest.mark.parametrize("name", MODELS)
def test_changing_a_token_changes_no_earlier_logit(name: str) -> None:
    decoder, tokens = make(name)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 41
    before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(before.logits[:, :12], after.logits[:, :12], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before.logits[:, 12], after.logits[:, 12])
    for depth, (one, two) in enumerate(zip(before.mtp_logits, after.mtp_logits, strict=True), start=1):
        torch.testing.assert_close(one[:, : 12 - depth], two[:, : 12 - depth], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one[:, 12 - depth], two[:, 12 - depth]), "depth k at i sees token i + k"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 11, 1]])
def test_cached_equals_full(name: str, pieces: list[int]) -> None:
    decoder, tokens = make(name)
    cache = decoder.new_cache(2, 20)
    logits = torch.cat([decoder(part, cache).logits for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, decoder(tokens).logits, rtol=1e-10, atol=1e-10)
    assert cache.length == 20


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_may_be_narrower_than_the_model(name: str) -> None:
    decoder, tokens = make(name)
    cache = decoder.new_cache(2, 20, torch.float32)
    logits = torch.cat([decoder(part, cache).logits for part in tokens.split([12, *[1] * 8], dim=1)], dim=1)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, decoder(tokens).logits, rtol=1e-3, atol=1e-3)


def test_positions_end_with_the_window() -> None:
    decoder, _ = make("mixed layers, two depths")
    with pytest.raises(ValueError, match="65 tokens are more than max_position_embeddings=64"):
        decoder(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"max_new_tokens=5 must lie in 1..4 after this prompt"):
        generate(decoder, torch.zeros(1, 60, dtype=torch.int64), 5)


@pytest.mark.parametrize("name", MODELS)
def test_lookahead_extends_every_depth_to_all_positions(name: str) -> None:
    decoder, tokens = make(name)
    depths = decoder.config.num_nextn_predict_layers
    short = decoder(tokens)
    assert [logits.shape[1] for logits in short.mtp_logits] == [20 - d for d in range(1, depths + 1)]
    known = decoder(tokens[:, : 20 - depths], lookahead=tokens[:, 20 - depths :])
    for one, two in zip(short.mtp_logits, known.mtp_logits, strict=True):
        assert two.shape[1] == 20 - depths
        torch.testing.assert_close(one[:, : 20 - depths], two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*MODELS, "toy_v3", "small_v3"])
def test_counts_equal_what_the_model_holds(name: str) -> None:
    config = {**MODELS, "toy_v3": toy_v3().model, "small_v3": small_v3().model}[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    held = {n: p.numel() for n, p in decoder.named_parameters()}
    counted = count.parameters(config)
    assert counted.total + counted.mtp == sum(held.values())
    assert counted.mtp == sum(v for n, v in held.items() if n.startswith("mtp_layers"))
    idle = 0
    for i, layer in enumerate(config.layers):
        if isinstance(experts := layer.feed_forward, MixtureOfExperts):
            routed = sum(v for n, v in held.items() if n.startswith(f"layers.{i}.mlp.experts"))
            idle += routed * (experts.n_routed_experts - experts.num_experts_per_tok) // experts.n_routed_experts
    assert counted.active == counted.total - idle
    cache = decoder.new_cache(2, 10, torch.bfloat16)
    assert count.cache_bytes(config, 10, "bfloat16") * 2 == cache.nbytes


def test_counts_of_deepseek_v3_are_the_published_ones() -> None:
    """Exact rows of the reference for V3: parameters, cache bytes and training operations."""
    attention = LatentAttention(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    experts = MixtureOfExperts(
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    )
    dense, sparse = LayerConfig(attention, DenseFeedForward(intermediate_size=18432)), LayerConfig(attention, experts)
    config = ModelConfig(
        vocab_size=129280, hidden_size=7168, layers=(*[dense] * 3, *[sparse] * 58), mtp_layers=(sparse,)
    )
    counted = count.parameters(config)
    assert counted.total == 671_026_404_352
    assert counted.active == 37_552_282_624
    assert counted.active_without_embedding == 36_625_603_584
    assert counted.active_without_embedding_and_head == 35_698_924_544
    assert counted.mtp == 11_610_067_968
    assert count.cache_bytes(config, 1, "bfloat16") == 70_272
    assert count.training_flops_per_token(config, 4096) / 1e9 == pytest.approx(250.5, abs=0.05)


def test_every_weight_is_initialised() -> None:
    decoder = Decoder(MODELS["mixed layers, two depths"])
    with torch.no_grad():
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            tensor.fill_(float("nan"))
    initialize(decoder, std=0.02)
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        assert tensor.isfinite().all(), name


def test_an_unknown_module_with_weights_is_refused_by_initialize() -> None:
    with pytest.raises(ValueError, match="no initial weights are defined for 0 \\(Conv1d\\)"):
        initialize(nn.Sequential(nn.Conv1d(1, 1, 1)), std=0.02)


def test_greedy_generation_equals_the_full_pass() -> None:
    decoder, tokens = make("V3 in small")
    generation = generate(decoder, tokens[:, :5], 8)
    expected = tokens[:, :5]
    for _ in range(8):
        expected = torch.cat((expected, decoder(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generation.tokens, expected)
    assert generation.cache_bytes == decoder.new_cache(2, 13).nbytes


def test_sampling_repeats_by_seed_and_leaves_the_global_generator_alone() -> None:
    decoder, tokens = make("V3 in small")
    state = torch.get_rng_state()
    draws = [generate(decoder, tokens[:, :3], 12, temperature=1.0, seed=s).tokens for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(distribution(logits, temperature=1.0, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))
    torch.testing.assert_close(distribution(logits, temperature=1.0, top_p=0.5), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(distribution(logits, temperature=1.0, top_p=1.0), logits.exp())
    colder = distribution(logits, temperature=0.5, top_p=1.0)
    torch.testing.assert_close(colder, logits.exp() ** 2 / (logits.exp() ** 2).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be above 0"),
    ],
)
def test_bad_generation_settings_get_one_line(arguments: dict, message: str) -> None:
    decoder, tokens = make("V3 in small")
    with pytest.raises(ValueError, match=message):
        generate(decoder, tokens, **{"max_new_tokens": 1, **arguments})
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(decoder, tokens[:, :0], 1)
