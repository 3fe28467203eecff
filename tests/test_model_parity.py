"""Equal logits and gradients with `transformers`' DeepSeek-V3 for the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deepseek_v3_reference import lift_float32_casts, reference_with_weights_of

from workbench.blocks.norm import RMSNorm
from workbench.blocks.router import Router
from workbench.model.config import (
    DenseFeedForward,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    Yarn,
)
from workbench.model.decoder import Decoder
from workbench.model.rotary import rotary_frequencies

ODD = LatentAttention(
    num_attention_heads=3, q_lora_rank=19, kv_lora_rank=17, qk_nope_head_dim=14, qk_rope_head_dim=6, v_head_dim=11
)
GROUPED = MixtureOfExperts(
    n_routed_experts=12,
    num_experts_per_tok=4,
    moe_intermediate_size=20,
    n_shared_experts=2,
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
)
YARN = Yarn(factor=8.0, original_max_position_embeddings=24, mscale=1.0, mscale_all_dim=1.0)


def v3(attention: LatentAttention, experts: MixtureOfExperts) -> ModelConfig:
    dense = LayerConfig(attention, DenseFeedForward(intermediate_size=61))
    sparse = LayerConfig(attention, experts)
    return ModelConfig(
        vocab_size=97,
        hidden_size=48,
        layers=(dense, sparse, sparse),
        max_position_embeddings=192,
        initializer_range=0.2,
    )


CASES = {
    "odd ranks, three groups": v3(ODD, GROUPED),
    "no query compression": v3(replace(ODD, q_lora_rank=None), GROUPED),
    "one group, unnormalised weights": v3(ODD, replace(GROUPED, n_group=1, topk_group=1, norm_topk_prob=False)),
    "YaRN": v3(replace(ODD, rope=Rope(rope_interleave=True, scaling=YARN)), GROUPED),
    "YaRN, different mscales": v3(
        replace(ODD, rope=Rope(rope_interleave=True, scaling=replace(YARN, mscale=0.7, mscale_all_dim=1.3))), GROUPED
    ),
    "YaRN without mscale": v3(
        replace(ODD, rope=Rope(rope_interleave=True, scaling=replace(YARN, mscale=None, mscale_all_dim=None))), GROUPED
    ),
    "half layout, another base": v3(replace(ODD, rope=Rope(rope_theta=500.0)), GROUPED),
}


def make(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(7)
    decoder = Decoder(config)
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)  # equal gains would hide that two were swapped
        if isinstance(module, Router):
            module.e_score_correction_bias.normal_(std=0.5)
    return decoder.to(dtype)


def chosen(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([r.indices.sort(-1).values for r in decoder(tokens).routing if r is not None])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_the_reference(name: str, dtype: torch.dtype, allowed: float) -> None:
    decoder = make(CASES[name], dtype)
    peer = reference_with_weights_of(decoder).to(dtype).eval()
    if dtype == torch.float64:
        attention = decoder.config.layers[0].attention
        lift_float32_casts(peer, rotary_frequencies(attention, torch.float64, torch.device("cpu")))
    tokens = torch.randint(0, 97, (2, 131), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = decoder(tokens).logits, peer(tokens).logits
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    assert difference <= allowed, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("name", ["odd ranks, three groups", "YaRN", "YaRN without mscale"])
def test_rotary_frequencies_are_the_references_own(name: str) -> None:
    decoder = make(CASES[name], torch.float32)
    peer = reference_with_weights_of(decoder)
    ours = rotary_frequencies(CASES[name].layers[0].attention, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ours, peer.model.rotary_emb.inv_freq, rtol=0, atol=0)


def test_the_selection_bias_of_the_cases_changes_choices() -> None:
    decoder = make(CASES["odd ranks, three groups"], torch.float32)
    tokens = torch.randint(0, 97, (2, 131), generator=torch.Generator().manual_seed(1))
    with_bias = chosen(decoder, tokens)
    for module in decoder.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()
    changed = (chosen(decoder, tokens) != with_bias).any(-1).float().mean()
    assert changed > 0.2


def test_gradients_equal_the_reference() -> None:
    decoder = make(CASES["YaRN"], torch.float32)
    peer = reference_with_weights_of(decoder)
    tokens = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(1))
    for model in (decoder, peer):
        torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    reference = dict(peer.named_parameters())
    for name, parameter in decoder.named_parameters():
        theirs = reference[name if name.startswith("lm_head") else f"model.{name}"].grad
        assert parameter.grad is not None and theirs is not None
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()), msg=name)
