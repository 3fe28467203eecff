"""The FP8 latent cache: what it rounds, what it weighs, and that a model generates from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.blocks.float8_latent_cache import Float8LatentCache
from workbench.model.config import GroupedQueryAttention, LayerConfig
from workbench.model.count import cache_bytes
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.train.recipes import toy_v3, v3_style
from workbench_kernels.quantize_blockwise import FP8, WIDTH, dequantize, quantize_blockwise


@pytest.mark.parametrize("width", [1, 64, 127, 128, 129, 512])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6])
def test_no_number_is_further_off_than_fp8_allows(width: int, size: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, width) * size * torch.logspace(-4, 0, width)
    narrow, scale = quantize_blockwise(x)
    assert narrow.dtype == FP8 and narrow.shape == x.shape and scale.shape == (3, 7, -(-width // WIDTH))
    allowed = (x.abs() / 16).maximum(scale.repeat_interleave(WIDTH, -1)[..., :width] * 2**-10)
    error = (dequantize(narrow, scale) - x).abs()
    assert (error <= allowed * 1.001).all()
    assert (error > 0).any() or width == 1


def test_each_block_has_its_own_scale_and_zeros_stay_zeros() -> None:
    x = torch.cat((torch.full((1, 128), 1e4), torch.full((1, 128), 1e-4), torch.zeros(1, 128)), dim=-1)
    torch.testing.assert_close(dequantize(*quantize_blockwise(x)), x, rtol=1e-6, atol=0)


def test_it_weighs_what_the_count_says_and_what_flashmla_keeps() -> None:
    cache = Float8LatentCache(2, 10, kv_lora_rank=512, qk_rope_head_dim=64, device=torch.device("cpu"))
    assert cache.nbytes == 2 * 10 * 656
    decoder = Decoder(toy_v3().model)
    assert decoder.new_cache(3, 100, FP8).nbytes == 3 * cache_bytes(decoder.config, 100, "float8")


def test_tokens_in_parts_are_the_same_tokens() -> None:
    torch.manual_seed(0)
    latent, key = torch.randn(2, 9, 70), torch.randn(2, 9, 6)
    place = {"kv_lora_rank": 70, "qk_rope_head_dim": 6, "device": torch.device("cpu")}
    whole, parts = Float8LatentCache(2, 9, **place), Float8LatentCache(2, 9, **place)
    whole.append(latent, key)
    parts.append(latent[:, :6], key[:, :6])
    parts.truncate(4)
    parts.append(latent[:, 4:], key[:, 4:])
    expected, found = whole.parts(torch.float32), parts.parts(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].dtype == torch.float32 and not torch.equal(found[0], latent)
    with pytest.raises(ValueError, match="the cache holds max_length=9 tokens"):
        parts.append(latent[:, :1], key[:, :1])


@pytest.mark.parametrize("speculate", [False, True])
def test_a_model_generates_from_it_near_its_own_logits(speculate: bool) -> None:
    config = v3_style(
        hidden_size=32,
        num_layers=3,
        num_attention_heads=2,
        q_lora_rank=12,
        kv_lora_rank=16,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        vocab_size=50,
    )
    # Dense throughout: a rounded number may send a token to other experts, and then its logits are others.
    config = replace(config, layers=config.layers[:1] * 3, mtp_layers=config.layers[:1], initializer_range=0.1)
    torch.manual_seed(0)
    decoder = Decoder(config).double().eval()
    tokens = torch.randint(0, 50, (2, 12))
    full = decoder(tokens).logits
    narrow = decoder(tokens, decoder.new_cache(2, 12, FP8)).logits
    assert 0 < float((narrow - full).abs().max().detach()) < 0.05 * float(full.abs().max())
    plain = generate(decoder, tokens, 6, cache_dtype=FP8)
    assert torch.equal(generate(decoder, tokens, 6, cache_dtype=FP8, speculate=speculate).tokens, plain.tokens)
    assert plain.cache_bytes == 2 * cache_bytes(config, 18, "float8")


def test_other_attentions_refuse_it() -> None:
    model = toy_v3().model
    attention = GroupedQueryAttention(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    grouped = replace(model, layers=(LayerConfig(attention, model.layers[0].feed_forward),), mtp_layers=())
    with pytest.raises(ValueError, match="dtype=float8_e4m3fn is for LatentAttention; GroupedQuery"):
        Decoder(grouped).new_cache(1, 8, FP8)
