"""Random small configurations of every published type: odd sizes, and whatever the type leaves free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from workbench.model.config import (
    ClampedActivation,
    CompressedAttention,
    DenseFeedForward,
    GroupedQueryAttention,
    HeavyCompression,
    HyperConnections,
    LatentAttention,
    LayerConfig,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    SparseCompression,
    SparseLatentAttention,
    Yarn,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]


def whole(draw: Draw, low: int, high: int, *, multiple_of: int = 1) -> int:
    """A whole number of low..high that `multiple_of` divides."""
    return multiple_of * draw(st.integers(-(-low // multiple_of), high // multiple_of))


def one_of(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


def rope(draw: Draw, *, interleave: bool = False, kinds: tuple[str, ...] = ("plain", "yarn", "llama3")) -> Rope:
    """Rotary positions; windows so short that sequences leave them. Only latent attention has `mscale`s."""
    scaling: Yarn | Llama3Scaling | None = None
    stretched = {"factor": one_of(draw, 1.0, 2.5, 40.0), "original_max_position_embeddings": whole(draw, 6, 40)}
    match one_of(draw, *kinds):
        case "yarn":
            fast = one_of(draw, 32.0, 4.0, 1.0)
            scaling = Yarn(**stretched, beta_fast=fast, beta_slow=one_of(draw, 1.0, 0.25), truncate=draw(st.booleans()))
            if "mscale" in kinds:
                scales = {name: one_of(draw, None, 0.707, 1.3) for name in ("mscale", "mscale_all_dim")}
                scaling = replace(scaling, **scales)
            else:
                scaling = replace(scaling, attention_factor=one_of(draw, None, 1.0, 0.8))
        case "llama3":
            slow = one_of(draw, 1.0, 0.5)
            fast = slow * one_of(draw, 1.5, 4.0)
            scaling = Llama3Scaling(**stretched, low_freq_factor=slow, high_freq_factor=fast)
    return Rope(rope_theta=one_of(draw, 50.0, 10_000.0, 5e5), rope_interleave=interleave, scaling=scaling)


def grouped(draw: Draw, **changes: Any) -> GroupedQueryAttention:
    """From multi-query to multi-head."""
    shared = whole(draw, 1, 3)
    attention = GroupedQueryAttention(
        num_attention_heads=shared * whole(draw, 1, 4),
        num_key_value_heads=shared,
        head_dim=whole(draw, 2, 14, multiple_of=2),
        rope=rope(draw),
    )
    return replace(attention, **changes)


def latent(draw: Draw, *, interleave: bool = True, compressed: bool = False, even: bool = False) -> LatentAttention:
    step = 2 if even else 1
    return LatentAttention(
        num_attention_heads=whole(draw, 1, 5),
        q_lora_rank=whole(draw, 1, 20) if compressed or draw(st.booleans()) else None,
        kv_lora_rank=whole(draw, 1, 20, multiple_of=step),
        qk_nope_head_dim=whole(draw, 1, 14, multiple_of=step),
        qk_rope_head_dim=whole(draw, 2, 8, multiple_of=2),
        v_head_dim=whole(draw, 1, 14),
        rope=rope(draw, interleave=interleave, kinds=("plain", "yarn", "mscale")),
    )


def dense(draw: Draw) -> DenseFeedForward:
    return DenseFeedForward(intermediate_size=whole(draw, 1, 40))


def best_of_all(draw: Draw, **changes: Any) -> MixtureOfExperts:
    """The best of a softmax over all experts."""
    experts = whole(draw, 1, 9)
    mixture = MixtureOfExperts(
        n_routed_experts=experts,
        num_experts_per_tok=whole(draw, 1, experts),
        moe_intermediate_size=whole(draw, 1, 20),
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=draw(st.booleans()),
    )
    return replace(mixture, **changes)


def best_of_groups(draw: Draw, **settings: Any) -> MixtureOfExperts:
    """Shared experts, and the best of those in the best groups."""
    # V3 scores a group by its best two experts.
    groups, size = whole(draw, 1, 4), whole(draw, 2, 4)
    chosen = whole(draw, 1, groups)
    return MixtureOfExperts(
        n_routed_experts=groups * size,
        num_experts_per_tok=whole(draw, 1, chosen * size),
        moe_intermediate_size=whole(draw, 1, 20),
        n_group=groups,
        topk_group=chosen,
        routed_scaling_factor=one_of(draw, 1.0, 2.5, 0.3),
        **{"n_shared_experts": whole(draw, 0, 2), "norm_topk_prob": draw(st.booleans())} | settings,
    )


def model(draw: Draw, layers: list[LayerConfig], **changes: Any) -> ModelConfig:
    config = ModelConfig(
        vocab_size=whole(draw, 5, 61),
        hidden_size=whole(draw, 3, 48),
        layers=tuple(layers),
        max_position_embeddings=64,
        rms_norm_eps=one_of(draw, 1e-6, 1e-5, 1e-2),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.2,
    )
    return replace(config, **changes)


def alike(draw: Draw, attention: Any, feed_forward: Any, **changes: Any) -> ModelConfig:
    return model(draw, [LayerConfig(attention, feed_forward)] * whole(draw, 1, 3), **changes)


def leading_dense(draw: Draw, attention: Any, experts: MixtureOfExperts) -> ModelConfig:
    first = [LayerConfig(attention, dense(draw))] * whole(draw, 0, 2)
    return model(draw, first + [LayerConfig(attention, experts)] * whole(draw, 1, 2))


def windowed(draw: Draw, attention: GroupedQueryAttention, *feed_forwards: Any) -> ModelConfig:
    """Windows of one width in some layers or none."""
    width = whole(draw, 1, 20)
    windows = [one_of(draw, None, width) for _ in feed_forwards]
    attentions = [replace(attention, sliding_window=window) for window in windows]
    return model(draw, [LayerConfig(a, f) for a, f in zip(attentions, feed_forwards, strict=True)])


@st.composite
def llama(draw: Draw) -> ModelConfig:
    biased = draw(st.booleans())
    attention = grouped(draw, qkv_bias=biased, o_bias=biased)
    width = whole(draw, 2, 50, multiple_of=attention.num_attention_heads)
    return alike(draw, attention, dense(draw), hidden_size=width)


@st.composite
def qwen2(draw: Draw) -> ModelConfig:
    return windowed(draw, grouped(draw, qkv_bias=True), *[dense(draw)] * whole(draw, 1, 3))


@st.composite
def mixtral(draw: Draw) -> ModelConfig:
    window = one_of(draw, None, whole(draw, 1, 20))
    return alike(draw, grouped(draw, sliding_window=window), best_of_all(draw, norm_topk_prob=True))


@st.composite
def qwen3_moe(draw: Draw) -> ModelConfig:
    biased, window = draw(st.booleans()), one_of(draw, None, whole(draw, 1, 20))
    attention = grouped(draw, qk_norm="head", qkv_bias=biased, o_bias=biased, sliding_window=window)
    experts, other = LayerConfig(attention, best_of_all(draw)), LayerConfig(attention, dense(draw))
    layers = [one_of(draw, experts, other) for _ in range(whole(draw, 0, 2))]
    return model(draw, draw(st.permutations([experts, *layers])))


@st.composite
def olmoe(draw: Draw) -> ModelConfig:
    biased = draw(st.booleans())
    attention = grouped(draw, qk_norm="full", qkv_bias=biased, o_bias=biased)
    return alike(draw, attention, best_of_all(draw), hidden_size=attention.num_attention_heads * attention.head_dim)


@st.composite
def gpt_oss(draw: Draw) -> ModelConfig:
    biased = draw(st.booleans())
    activation = ClampedActivation(limit=one_of(draw, 0.1, 7.0), alpha=one_of(draw, 1.702, 0.5), offset=1.0)
    experts = best_of_all(draw, norm_topk_prob=True, router_bias=True, expert_bias=True, activation=activation)
    attention = grouped(draw, qkv_bias=biased, o_bias=biased, sinks=True)
    return windowed(draw, attention, *[experts] * whole(draw, 1, 3))


@st.composite
def glm4_moe(draw: Draw) -> ModelConfig:
    attention = grouped(draw, qkv_bias=draw(st.booleans()), qk_norm=one_of(draw, None, "head"))
    share = whole(draw, 2, attention.head_dim, multiple_of=2) / attention.head_dim
    if int(attention.head_dim * share) % 2 == 0:
        attention = replace(attention, partial_rotary_factor=share)
    return leading_dense(draw, attention, best_of_groups(draw))


@st.composite
def dots1(draw: Draw) -> ModelConfig:
    biased, experts = draw(st.booleans()), best_of_groups(draw)
    attention = grouped(draw, qk_norm="head", qkv_bias=biased, o_bias=biased)
    return windowed(draw, attention, *[dense(draw)] * whole(draw, 0, 2), *[experts] * whole(draw, 1, 2))


@st.composite
def deepseek_v2(draw: Draw) -> ModelConfig:
    # Even sizes: the reference reads its pairs as complex numbers from behind the latent and the plain part of a head.
    attention = latent(draw, even=True)
    experts = best_of_groups(draw, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    if experts.n_group == 1:
        experts = replace(experts, topk_method="greedy")
    width = whole(draw, 2, 50, multiple_of=attention.num_attention_heads)
    return replace(leading_dense(draw, attention, experts), hidden_size=width)


@st.composite
def deepseek_v3(draw: Draw) -> ModelConfig:
    return leading_dense(draw, latent(draw, interleave=draw(st.booleans())), best_of_groups(draw))


@st.composite
def deepseek_v32(draw: Draw) -> ModelConfig:
    read = latent(draw, compressed=True)
    attention = SparseLatentAttention(
        latent=read,
        index_n_heads=whole(draw, 1, 4),
        index_head_dim=read.qk_rope_head_dim + whole(draw, 0, 6),
        index_topk=whole(draw, 1, 20),
    )
    return leading_dense(draw, attention, best_of_groups(draw))


@st.composite
def deepseek_v4(draw: Draw) -> ModelConfig:
    groups, width = whole(draw, 1, 3), whole(draw, 2, 14)
    window = CompressedAttention(
        num_attention_heads=groups * whole(draw, 1, 3),
        head_dim=width,
        qk_rope_head_dim=whole(draw, 2, width, multiple_of=2),
        q_lora_rank=whole(draw, 1, 12),
        o_groups=groups,
        o_lora_rank=whole(draw, 1, 8),
        sliding_window=whole(draw, 2, 12),
        rope=rope(draw, interleave=True, kinds=("plain",)),
    )
    sparse = SparseCompression(
        compress_ratio=whole(draw, 1, 5),
        index_n_heads=whole(draw, 1, 4),
        index_head_dim=window.qk_rope_head_dim + whole(draw, 0, 6),
        index_topk=whole(draw, 1, 6),
    )
    stretched = rope(draw, interleave=True, kinds=("plain", "yarn"))
    if isinstance(stretched.scaling, Yarn):
        # The reference looks for `truncate` in the wrong place, and truncates always.
        stretched = replace(stretched, scaling=replace(stretched.scaling, attention_factor=1.0, truncate=True))
    kinds = [
        window,
        replace(window, compression=sparse, rope=stretched),
        replace(window, compression=HeavyCompression(compress_ratio=whole(draw, 1, 9)), rope=stretched),
    ]
    experts = best_of_all(
        draw,
        n_shared_experts=1,
        scoring_func=one_of(draw, "sqrtsoftplus", "sigmoid"),
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=one_of(draw, 1.0, 2.5),
        activation=ClampedActivation(limit=one_of(draw, 0.1, 10.0)),
    )
    hashed, routed = whole(draw, 0, 2), whole(draw, 0, 2)
    mixtures = [replace(experts, topk_method="hash")] * hashed + [experts] * routed or [experts]
    streams = HyperConnections(
        hc_mult=whole(draw, 1, 4), hc_sinkhorn_iters=whole(draw, 1, 8), hc_eps=one_of(draw, 1e-6, 1e-2)
    )
    layers = [LayerConfig(one_of(draw, *kinds), mixture) for mixture in mixtures]
    return model(draw, layers, hyper_connections=streams)


MODELS: dict[str, st.SearchStrategy[ModelConfig]] = {
    "llama": llama(),
    "qwen2": qwen2(),
    "mixtral": mixtral(),
    "qwen3_moe": qwen3_moe(),
    "olmoe": olmoe(),
    "gpt_oss": gpt_oss(),
    "glm4_moe": glm4_moe(),
    "dots1": dots1(),
    "deepseek_v2": deepseek_v2(),
    "deepseek_v3": deepseek_v3(),
    "deepseek_v32": deepseek_v32(),
    "deepseek_v4": deepseek_v4(),
}


@st.composite
def texts(draw: Draw, config: ModelConfig) -> Tensor:
    """Token ids [B, T] of one or a few sequences of any length."""
    shape = whole(draw, 1, 3), whole(draw, 1, 45)
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(whole(draw, 0, 99)))


@st.composite
def cuts(draw: Draw, length: int) -> list[int]:
    """Lengths of pieces that sum to `length`."""
    places = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    return [end - start for start, end in zip([0, *places], [*places, length], strict=True)]
