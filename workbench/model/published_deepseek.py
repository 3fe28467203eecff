"""The published configurations of the DeepSeek line, V2 to V4, and of those that share its classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from workbench.model.config import (
    ClampedActivation,
    CompressedAttention,
    DenseFeedForward,
    HeavyCompression,
    HyperConnections,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    SparseCompression,
    SparseLatentAttention,
    Yarn,
    require,
)
from workbench.model.feed_forward_config import ScoringFunction
from workbench.model.published_fields import Fields, no_partial_rotation, read_rope, rope_fields

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYER_OF_RATIO = {0: SLIDING, 4: SPARSE, 128: HEAVY}


def deepseek_v2(fields: Fields) -> ModelConfig:
    """DeepSeek-V2 and V2-Lite: softmax scores over all experts, never normalised again.

    `norm_topk_prob` is ignored, as the reference does.
    """
    refuse_what_latent_attention_lacks(fields)
    fields.only("scoring_func", "softmax")
    fields.only("topk_method", "greedy", "group_limited_greedy")
    method = fields.text("topk_method", default="greedy", null="greedy")
    grouped = method == "group_limited_greedy"
    experts = MixtureOfExperts(
        n_routed_experts=fields.integer("n_routed_experts", "num_experts", default=64),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size", default=1407),
        n_shared_experts=fields.integer("n_shared_experts", default=2),
        scoring_func="softmax",
        topk_method="group_limited_greedy" if grouped else "greedy",
        n_group=fields.integer("n_group") if grouped else 1,
        topk_group=fields.integer("topk_group") if grouped else 1,
        norm_topk_prob=False,
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
    )
    window = fields.integer("max_position_embeddings", default=2048)
    attention = latent_attention(fields, window, num_attention_heads=32, interleave=True)
    num_layers = fields.integer("num_hidden_layers", default=32)
    sparse_from = fields.integer("first_k_dense_replace", default=0)
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=11008))
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=102400),
        hidden_size=fields.integer("hidden_size", default=4096),
        layers=tuple(LayerConfig(attention, experts if i >= sparse_from else dense) for i in range(num_layers)),
        max_position_embeddings=window,
        **common(fields),
    )


def deepseek_v3(fields: Fields) -> ModelConfig:
    """DeepSeek-V3 and R1, Kimi-K2, Moonlight.

    The further prediction depths are those that the file states (`num_nextn_predict_layers` or `num_mtp_layers`); a
    file that says nothing has none, where the reference class would assume one.
    """
    window = fields.integer("max_position_embeddings", default=4096)
    interleave = fields.flag("rope_interleave", default=True, null=False)
    attention = latent_attention(fields, window, num_attention_heads=128, interleave=interleave)
    return with_sigmoid_experts(fields, attention, window, sparse_from_default=3)


def deepseek_v32(fields: Fields) -> ModelConfig:
    """DeepSeek-V3.2: V3 whose attention reads the tokens that an indexer picks, in its MTP layers too."""
    window = fields.integer("max_position_embeddings", default=163840)
    latent = latent_attention(fields, window, num_attention_heads=128, interleave=True)
    attention = SparseLatentAttention(
        latent=latent,
        index_n_heads=fields.integer("index_n_heads", default=64),
        index_head_dim=fields.integer("index_head_dim", default=128),
        index_topk=fields.integer("index_topk", default=2048),
    )
    return with_sigmoid_experts(fields, attention, window, sparse_from_default=3)


def with_sigmoid_experts(
    fields: Fields, attention: LatentAttention | SparseLatentAttention, window: int, *, sparse_from_default: int
) -> ModelConfig:
    """The rest of V3 and V3.2 around their attention."""
    refuse_what_latent_attention_lacks(fields)
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    experts = MixtureOfExperts(
        n_routed_experts=fields.integer("n_routed_experts", "num_local_experts", "num_experts", default=256),
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=8),
        moe_intermediate_size=fields.integer("moe_intermediate_size", default=2048),
        n_shared_experts=fields.integer("n_shared_experts", default=1),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=fields.integer("n_group", default=8),
        topk_group=fields.integer("topk_group", default=4),
        norm_topk_prob=fields.flag("norm_topk_prob", default=True, null=False),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=2.5),
    )
    dense = DenseFeedForward(intermediate_size=fields.integer("intermediate_size", default=18432))
    num_layers = fields.integer("num_hidden_layers", default=61)
    sparse_from = fields.integer("first_k_dense_replace", default=sparse_from_default)
    kinds = fields.names("mlp_layer_types", ("dense", "sparse"), num_layers)
    kinds = kinds or ["sparse" if i >= sparse_from else "dense" for i in range(num_layers)]
    depths = fields.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, null=0)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=129280),
        hidden_size=fields.integer("hidden_size", default=7168),
        layers=tuple(LayerConfig(attention, experts if kind == "sparse" else dense) for kind in kinds),
        mtp_layers=(LayerConfig(attention, experts),) * depths,
        max_position_embeddings=window,
        **common(fields),
    )


def deepseek_v4(fields: Fields) -> ModelConfig:
    """DeepSeek-V4: windows and compressed entries, hash-routed first layers, hyper-connections.

    Its MTP layer, which has streams of its own, is not modelled: `num_nextn_predict_layers` is ignored, as in the
    reference. So is `norm_topk_prob`: weights are always normalised.
    """
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, False)
    fields.only("num_key_value_heads", 1)
    fields.only("n_shared_experts", 1)
    fields.only("topk_method", "noaux_tc")
    num_layers = fields.integer("num_hidden_layers", default=43)
    attentions = compressed_attentions(fields)
    kinds = fields.names("mlp_layer_types", ("hash_moe", "moe"), num_layers)
    hashed = fields.integer("num_hash_layers", default=3, null=3)
    kinds = kinds or ["hash_moe" if i < hashed else "moe" for i in range(num_layers)]
    fields.only("scoring_func", "sqrtsoftplus", "sigmoid", "softmax")
    inner = fields.integer("moe_intermediate_size", "intermediate_size", default=2048)
    fields.only("intermediate_size", inner)  # another name of the same
    experts = MixtureOfExperts(
        n_routed_experts=fields.integer("n_routed_experts", "num_local_experts", default=256),
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=6),
        moe_intermediate_size=inner,
        n_shared_experts=1,
        scoring_func=cast(ScoringFunction, fields.text("scoring_func", default="sqrtsoftplus")),
        topk_method="noaux_tc",
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.5),
        activation=ClampedActivation(limit=fields.number("swiglu_limit", default=10.0)),
    )
    by_table = replace(experts, topk_method="hash")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", default=129280),
        hidden_size=fields.integer("hidden_size", default=4096),
        layers=tuple(
            LayerConfig(attentions[layer], by_table if kind == "hash_moe" else experts)
            for layer, kind in zip(compressed_layers(fields, num_layers), kinds, strict=True)
        ),
        max_position_embeddings=fields.integer("max_position_embeddings", default=1048576),
        hyper_connections=HyperConnections(
            hc_mult=fields.integer("hc_mult", default=4),
            hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters", default=20),
            hc_eps=fields.number("hc_eps", default=1e-6),
        ),
        **common(fields),
    )


def compressed_layers(fields: Fields, num_layers: int) -> list[str]:
    """The kind of attention of every V4 layer: named, or by its ratio; left out, two heavy layers and then by turns."""
    named = fields.names("layer_types", (SLIDING, SPARSE, HEAVY), num_layers)
    if named is not None:
        return named
    ratios = fields.integers("compress_ratios")
    if ratios is None:
        return [SPARSE if i >= 2 and i % 2 else HEAVY for i in range(num_layers)]
    unknown = [ratio for ratio in ratios if ratio not in LAYER_OF_RATIO]
    require(not unknown, f"compress_ratios has {unknown[:1]}; {fields.owner} may have 0, 4, 128")
    # The published list goes on with the MTP layer.
    require(len(ratios) >= num_layers, f"compress_ratios has {len(ratios)} entries; num_hidden_layers={num_layers}")
    return [LAYER_OF_RATIO[ratio] for ratio in ratios[:num_layers]]


def compressed_attentions(fields: Fields) -> dict[str, CompressedAttention]:
    """V4's three attentions by the kind of layer."""
    rates = Fields(fields.mapping("compress_rates"), f"compress_rates of {fields.owner}")
    # The rates of their own win over those in the mapping.
    sparse = fields.integer("compress_rate_csa", default=rates.integer(SPARSE, default=4))
    heavy = fields.integer("compress_rate_hca", default=rates.integer(HEAVY, default=128))
    main, compressed, width = compressed_ropes(fields)
    window = CompressedAttention(
        num_attention_heads=fields.integer("num_attention_heads", default=64),
        head_dim=fields.integer("head_dim", default=512),
        qk_rope_head_dim=width,
        q_lora_rank=fields.integer("q_lora_rank", default=1024),
        o_groups=fields.integer("o_groups", default=8),
        o_lora_rank=fields.integer("o_lora_rank", default=1024),
        sliding_window=fields.integer("sliding_window", default=128),
        rope=main,
    )
    picked = SparseCompression(
        compress_ratio=sparse,
        index_n_heads=fields.integer("index_n_heads", default=64),
        index_head_dim=fields.integer("index_head_dim", default=128),
        index_topk=fields.integer("index_topk", default=512),
    )
    return {
        SLIDING: window,
        SPARSE: replace(window, compression=picked, rope=compressed),
        HEAVY: replace(window, compression=HeavyCompression(compress_ratio=heavy), rope=compressed),
    }


def compressed_ropes(fields: Fields) -> tuple[Rope, Rope, int]:
    """V4's positions in layers of the window alone and in those that compress, and how many numbers turn.

    The window's have no scaling. The others' base is `compress_rope_theta`; YaRN scales no cosines unless told to.
    """
    said = rope_fields(fields)
    window = fields.integer("max_position_embeddings", default=1048576)
    nested = isinstance(said.plain.get("main"), dict) and isinstance(said.plain.get("compress"), dict)
    if nested:
        main, compressed = (Fields(said.plain[name], f"{name} of {said.owner}") for name in ("main", "compress"))
    else:
        theta = {"rope_theta": fields.number("compress_rope_theta", default=160_000.0)}
        main, compressed = Fields({}, said.owner), Fields({**said.plain, **theta}, said.owner)
    ropes = []
    for place in (main, compressed):
        rope = read_rope(fields, place, max_position_embeddings=window, interleave=True, sharpens_softmax=True)
        if isinstance(rope.scaling, Yarn) and not nested and "attention_factor" not in place.plain:
            rope = replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
        ropes.append(rope)
    head_dim = fields.integer("head_dim", default=512)
    width = fields.integer("qk_rope_head_dim", default=int(head_dim * 64 / 512))
    for place in (main, fields):
        share = place.optional_number("partial_rotary_factor")
        width = width if share is None else int(head_dim * share)
    return ropes[0], ropes[1], width


def latent_attention(
    fields: Fields, max_position_embeddings: int, *, num_attention_heads: int, interleave: bool
) -> LatentAttention:
    """Multi-head latent attention with the widths that all of the line share as defaults."""
    heads = fields.integer("num_attention_heads", default=num_attention_heads)
    fields.only("num_key_value_heads", heads)
    said = rope_fields(fields)
    no_partial_rotation(fields, said)
    return LatentAttention(
        num_attention_heads=heads,
        q_lora_rank=fields.optional_integer("q_lora_rank", default=1536),
        kv_lora_rank=fields.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", default=128),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", default=64),
        v_head_dim=fields.integer("v_head_dim", default=128),
        rope=read_rope(
            fields, said, max_position_embeddings=max_position_embeddings, interleave=interleave, sharpens_softmax=True
        ),
    )


def refuse_what_latent_attention_lacks(fields: Fields) -> None:
    """One line for biases, and for routing in some layers only."""
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, False)
    fields.only("moe_layer_freq", 1)


def common(fields: Fields, *, rms_norm_eps: float = 1e-6) -> dict[str, Any]:
    """Fields that mean the same everywhere; another activation, or noise while training, is refused."""
    fields.only("hidden_act", "silu")
    fields.only("attention_dropout", 0)
    fields.only("router_jitter_noise", 0)
    return {
        "rms_norm_eps": fields.number("rms_norm_eps", default=rms_norm_eps),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "initializer_range": fields.number("initializer_range", default=0.02),
    }
