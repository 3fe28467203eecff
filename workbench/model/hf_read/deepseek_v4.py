"""The published configuration of DeepSeek-V4: windows and compressed entries, hash routing, hyper-connections."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from workbench.model.config import (
    ClampedActivation,
    CompressedAttention,
    HeavyCompression,
    HyperConnections,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    Rope,
    SparseCompression,
    Yarn,
    require,
)
from workbench.model.feed_forward_config import ScoringFunction
from workbench.model.hf_read.fields import Fields, common, read_rope, rope_fields

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYER_OF_RATIO = {0: SLIDING, 4: SPARSE, 128: HEAVY}


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
