"""Equal logits with `transformers` of the families beside DeepSeek-V3: Llama, Mixtral and DeepSeek-V2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from workbench.blocks.norm import RMSNorm
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

ALLOWED = 1e-5
HEADS, HEAD_DIM = 4, 10  # queries of another width than the model
MIXTRAL = MixtureOfExperts(
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=True,
)
V2_GREEDY = MixtureOfExperts(
    n_routed_experts=12,
    num_experts_per_tok=4,
    moe_intermediate_size=20,
    n_shared_experts=2,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
)
V2_GROUPED = replace(V2_GREEDY, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)
# An even latent: the reference reads its pairs as complex numbers from behind it.
V2_ATTENTION = LatentAttention(
    num_attention_heads=4, q_lora_rank=19, kv_lora_rank=18, qk_nope_head_dim=14, qk_rope_head_dim=6, v_head_dim=11
)
YARN = Rope(
    rope_interleave=True,
    scaling=Yarn(factor=8.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707),
)


def grouped(groups: int, **rope: Any) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        num_attention_heads=HEADS, num_key_value_heads=groups, head_dim=HEAD_DIM, rope=Rope(**rope)
    )


def model(*layers: LayerConfig, tied: bool = False, eps: float = 1e-5) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=48,
        layers=layers,
        max_position_embeddings=128,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


def llama(groups: int, *, tied: bool = False, **rope: Any) -> ModelConfig:
    layer = LayerConfig(grouped(groups, **rope), DenseFeedForward(intermediate_size=37))
    return model(layer, layer, tied=tied)


def mixtral(groups: int) -> ModelConfig:
    layer = LayerConfig(grouped(groups), MIXTRAL)
    return model(layer, layer)


def v2(attention: LatentAttention, experts: MixtureOfExperts) -> ModelConfig:
    dense = LayerConfig(attention, DenseFeedForward(intermediate_size=37))
    sparse = LayerConfig(attention, experts)
    return model(dense, sparse, sparse, eps=1e-6)


CASES = {
    "Llama, one key/value head": llama(1),
    "Llama, two key/value heads": llama(2),
    "Llama, a key/value head for every query head": llama(HEADS),
    "Llama, tied, another base": llama(2, tied=True, rope_theta=500.0),
    "Mixtral": mixtral(2),
    "V2-Lite: greedy, queries uncompressed": v2(replace(V2_ATTENTION, q_lora_rank=None), V2_GREEDY),
    "V2: two of four groups, scaled": v2(V2_ATTENTION, V2_GROUPED),
    "V2: YaRN": v2(replace(V2_ATTENTION, rope=YARN), V2_GROUPED),
}


def rope_parameters(rope: Rope) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.rope_theta}
    names = (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    )
    yarn = {name: getattr(rope.scaling, name) for name in names}
    return {"rope_type": "yarn", "rope_theta": rope.rope_theta, **yarn}


def reference(config: ModelConfig) -> Any:
    """The model of `transformers` that the configuration describes, with weights of its own."""
    attention, feed_forward = config.layers[-1].attention, config.layers[-1].feed_forward
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope_parameters(attention.rope),
    }
    match attention, feed_forward:
        case GroupedQueryAttention(), DenseFeedForward():
            return LlamaForCausalLM(
                LlamaConfig(
                    **common,
                    num_key_value_heads=attention.num_key_value_heads,
                    head_dim=attention.head_dim,
                    intermediate_size=feed_forward.intermediate_size,
                )
            )
        case GroupedQueryAttention(), MixtureOfExperts():
            return MixtralForCausalLM(
                MixtralConfig(
                    **common,
                    num_key_value_heads=attention.num_key_value_heads,
                    head_dim=attention.head_dim,
                    intermediate_size=feed_forward.moe_intermediate_size,
                    num_local_experts=feed_forward.n_routed_experts,
                    num_experts_per_tok=feed_forward.num_experts_per_tok,
                )
            )
        case LatentAttention(), MixtureOfExperts():
            first = config.layers[0].feed_forward
            assert isinstance(first, DenseFeedForward)
            return DeepseekV2ForCausalLM(
                DeepseekV2Config(
                    **common,
                    intermediate_size=first.intermediate_size,
                    first_k_dense_replace=1,
                    q_lora_rank=attention.q_lora_rank,
                    kv_lora_rank=attention.kv_lora_rank,
                    qk_nope_head_dim=attention.qk_nope_head_dim,
                    qk_rope_head_dim=attention.qk_rope_head_dim,
                    v_head_dim=attention.v_head_dim,
                    moe_intermediate_size=feed_forward.moe_intermediate_size,
                    n_routed_experts=feed_forward.n_routed_experts,
                    n_shared_experts=feed_forward.n_shared_experts,
                    num_experts_per_tok=feed_forward.num_experts_per_tok,
                    topk_method=feed_forward.topk_method,
                    n_group=feed_forward.n_group,
                    topk_group=feed_forward.topk_group,
                    norm_topk_prob=feed_forward.norm_topk_prob,
                    routed_scaling_factor=feed_forward.routed_scaling_factor,
                )
            )
        case _:
            raise AssertionError(f"no family has {attention} with {feed_forward}")


def make(config: ModelConfig) -> Decoder:
    torch.manual_seed(5)
    decoder = Decoder(config).eval()
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return decoder


def reference_with_weights_of(decoder: Decoder) -> Any:
    """The reference holding exactly the weights of `decoder`; these families have no selection bias."""
    peer = reference(decoder.config)
    weights = {}
    for key, value in decoder.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            assert not value.any()
        else:
            weights[key if key.startswith("lm_head") else f"model.{key}"] = value
    peer.load_state_dict(weights)
    if any(isinstance(layer.feed_forward, MixtureOfExperts) for layer in decoder.config.layers):
        peer.set_experts_implementation("eager")
    return peer.eval()


def largest_difference(decoder: Decoder, peer: Any) -> float:
    tokens = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = decoder(tokens).logits, peer(tokens).logits
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name: str) -> None:
    decoder = make(CASES[name])
    difference = largest_difference(decoder, reference_with_weights_of(decoder))
    assert difference <= ALLOWED, f"{difference:.2e}"


def with_experts(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same configuration with other routing in every layer that routes."""
    return replace(
        config,
        layers=tuple(
            replace(layer, feed_forward=replace(layer.feed_forward, **changes))
            if isinstance(layer.feed_forward, MixtureOfExperts)
            else layer
            for layer in config.layers
        ),
    )


GROUPS = "V2: two of four groups, scaled"
WRONG = {
    "interleaved positions": ("Llama, two key/value heads", llama(2, rope_interleave=True)),
    "weights not normalised": ("Mixtral", with_experts(CASES["Mixtral"], norm_topk_prob=False)),
    "weights normalised": (GROUPS, with_experts(CASES[GROUPS], norm_topk_prob=True)),
    "groups by their best two": (GROUPS, with_experts(CASES[GROUPS], topk_method="noaux_tc")),
    "no groups": (GROUPS, with_experts(CASES[GROUPS], topk_method="greedy", n_group=1, topk_group=1)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_comparison_sees_another_model(mistake: str) -> None:
    name, wrong = WRONG[mistake]
    peer = reference_with_weights_of(make(CASES[name]))
    assert largest_difference(make(wrong), peer) > 1000 * ALLOWED
