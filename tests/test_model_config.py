"""Configurations: exact round trips, and one clear line for what does not go together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from workbench.train.recipes import small_v3, toy_v3

EXPERTS = MixtureOfExperts(n_routed_experts=12, num_experts_per_tok=4, moe_intermediate_size=8, n_group=3, topk_group=2)

sizes = st.integers(1, 64)
ropes = st.builds(
    Rope,
    rope_theta=st.floats(2, 1e7),
    rope_interleave=st.booleans(),
    scaling=st.none()
    | st.builds(
        Yarn,
        factor=st.floats(1, 64),
        original_max_position_embeddings=sizes,
        mscale=st.none() | st.floats(0.1, 2),
        mscale_all_dim=st.none() | st.floats(0.1, 2),
    ),
)
attentions = st.one_of(
    st.builds(
        GroupedQueryAttention,
        num_attention_heads=st.just(8),
        num_key_value_heads=st.sampled_from([1, 2, 4, 8]),
        head_dim=sizes.map(lambda n: 2 * n),
        rope=ropes,
    ),
    st.builds(
        LatentAttention,
        num_attention_heads=sizes,
        q_lora_rank=st.none() | sizes,
        kv_lora_rank=sizes,
        qk_nope_head_dim=sizes,
        qk_rope_head_dim=sizes.map(lambda n: 2 * n),
        v_head_dim=sizes,
        rope=ropes,
    ),
)
feed_forwards = st.one_of(
    st.builds(DenseFeedForward, intermediate_size=sizes),
    st.builds(
        MixtureOfExperts,
        n_routed_experts=st.just(16),
        num_experts_per_tok=st.integers(1, 8),
        moe_intermediate_size=sizes,
        n_shared_experts=st.integers(0, 3),
        scoring_func=st.sampled_from(["softmax", "sigmoid"]),
        n_group=st.just(4),
        topk_group=st.integers(2, 4),
        norm_topk_prob=st.booleans(),
        routed_scaling_factor=st.floats(0.1, 16),
    ),
)
layers = st.lists(st.builds(LayerConfig, attentions, feed_forwards), min_size=1, max_size=4).map(tuple)


@settings(max_examples=25)
@given(st.builds(ModelConfig, vocab_size=sizes, hidden_size=sizes, layers=layers, mtp_layers=layers))
def test_json_round_trips_exactly(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9 must lie in 1..8 \(experts in topk_group groups\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be a whole number above 0"),
        ({"n_group": 5}, "n_group=5 must divide n_routed_experts=12"),
        ({"topk_group": 4}, r"topk_group=4 must lie in 1..3 \(n_group\)"),
        ({"n_group": 12}, "n_group=12 leaves groups of 1"),
        ({"topk_method": "greedy"}, "topk_method='greedy' knows no groups: n_group=3 must be 1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be 0 or more"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be above 0"),
    ],
)
def test_experts_that_do_not_go_together(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(EXPERTS, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=3, head_dim=4),
            "num_key_value_heads=3 must divide num_attention_heads=8",
        ),
        (
            lambda: GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=4, head_dim=5),
            "head_dim=5 x partial_rotary_factor=1.0 must give an even number above 0",
        ),
        (lambda: Yarn(factor=0.5, original_max_position_embeddings=8), "factor=0.5 must be at least 1"),
        (lambda: Yarn(factor=2.0, original_max_position_embeddings=8, beta_fast=0.5), "beta_fast=0.5 must be at least"),
        (lambda: Rope(rope_theta=1.0), "rope_theta=1.0 must be above 1"),
        (lambda: DenseFeedForward(intermediate_size=0), "intermediate_size=0 must be a whole number above 0"),
        (lambda: ModelConfig(vocab_size=8, hidden_size=8, layers=()), "layers=\\(\\) must hold at least one layer"),
    ],
)
def test_sizes_that_do_not_go_together(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_damaged_file_gets_one_line() -> None:
    text = toy_v3().model.to_json()
    for damaged, message in (
        (text[:-10], "not a model configuration"),
        (text.replace('"hidden_size": 256', '"hidden_size": "256"'), "hidden_size='256' must be int"),
        (text.replace('"vocab_size": 256,', ""), "lacks field 'vocab_size' \\(ModelConfig\\)"),
        (text.replace('"LatentAttention"', '"OsSystem"'), "unknown kind 'OsSystem'; known: GroupedQueryAttention"),
        (text.replace('"topk_group": 2', '"topk_group": 9'), "topk_group=9 must lie in 1..4"),
        ("[]", "must be a mapping of kind ModelConfig"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ModelConfig.from_json(damaged)
        assert "\n" not in str(caught.value)


def test_presets_have_the_sizes_that_they_claim() -> None:
    from workbench.model.count import parameters

    toy, small = parameters(toy_v3().model), parameters(small_v3().model)
    assert 9e6 < toy.total + toy.mtp < 11e6
    assert 45e6 < small.total < 60e6
