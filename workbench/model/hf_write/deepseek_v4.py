"""DeepSeek-V4's configuration as published: the one type whose layers differ in kind."""

from __future__ import annotations

from workbench.model.attention_config import CompressedAttention, HeavyCompression, SparseCompression, Yarn
from workbench.model.config import ModelConfig
from workbench.model.feed_forward_config import MixtureOfExperts
from workbench.model.hf_write.parts import Fields, fixed, positions
from workbench.model.require import require

_TYPE = "deepseek_v4"


def deepseek_v4(config: ModelConfig) -> Fields:
    streams = config.hyper_connections
    if streams is None:
        raise ValueError(f"{_TYPE} has hyper-connections; this configuration has hyper_connections=None")
    require(not config.mtp_layers, f"{_TYPE} has prediction layers of another build; mtp_layers must be ()")
    attentions = [layer.attention for layer in config.layers]
    compressed = [x for x in attentions if isinstance(x, CompressedAttention)]
    require(len(compressed) == len(attentions), f"{_TYPE} has CompressedAttention in every layer")
    first = compressed[0]
    for attention in compressed:
        fixed(attention, _TYPE, **{name: getattr(first, name) for name in _SHARED})
        fixed(attention.rope, _TYPE, rope_interleave=True)
    return {
        **{name: getattr(first, name) for name in _SHARED},
        "num_key_value_heads": 1,
        **_compression(compressed),
        **_positions(compressed),
        **_experts(config),
        "hc_mult": streams.hc_mult,
        "hc_sinkhorn_iters": streams.hc_sinkhorn_iters,
        "hc_eps": streams.hc_eps,
        "num_nextn_predict_layers": 0,
    }


_SHARED = (
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
)


def _compression(attentions: list[CompressedAttention]) -> Fields:
    """Which layer compresses how; `compress_ratios` is the published form, `layer_types` that of `transformers`."""
    names = {None: "sliding_attention", HeavyCompression: "heavily_compressed_attention"}
    names |= {SparseCompression: "compressed_sparse_attention"}
    found = [x.compression for x in attentions]
    heavy = {x for x in found if isinstance(x, HeavyCompression)}
    sparse = {x for x in found if isinstance(x, SparseCompression)}
    require(
        len(heavy) <= 1 and len(sparse) <= 1,
        f"{_TYPE} compresses heavily, and sparsely, in one way each; this configuration has {[*heavy, *sparse]}",
    )
    rates = {names[type(x)]: x.compress_ratio for x in (*heavy, *sparse)}
    indexer = next(iter(sparse), None)
    index = ("index_n_heads", "index_head_dim", "index_topk")
    return {
        "layer_types": [names[None if x is None else type(x)] for x in found],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128} | rates,
        "compress_ratios": [0 if x is None else x.compress_ratio for x in found],
        **({name: getattr(indexer, name) for name in index} if indexer else {}),
    }


def _positions(attentions: list[CompressedAttention]) -> Fields:
    """Layers with a window alone turn plainly; those that compress have another base, and stretch it."""
    plain = {x.rope for x in attentions if x.compression is None}
    stretched = {x.rope for x in attentions if x.compression is not None}
    require(len(plain) <= 1 and len(stretched) <= 1, f"{_TYPE} has one rope for windows and one for compressing layers")
    for rope in plain:
        fixed(rope, _TYPE, scaling=None)
    fields: Fields = {}
    for rope in plain:
        fields |= {"rope_theta": rope.rope_theta}
    for rope in stretched:
        if isinstance(rope.scaling, Yarn):
            # An absent factor means 1 in this type alone.
            fixed(rope.scaling, _TYPE, attention_factor=1.0)
        there = positions(rope)
        fields |= {"compress_rope_theta": there["rope_theta"], "rope_scaling": there["rope_scaling"]}
    return fields


def _experts(config: ModelConfig) -> Fields:
    mixtures = [x.feed_forward for x in config.layers if isinstance(x.feed_forward, MixtureOfExperts)]
    require(len(mixtures) == len(config.layers), f"{_TYPE} has experts in every layer")
    first = mixtures[0]
    shared = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "scoring_func")
    shared += ("routed_scaling_factor", "activation")
    hashed = sum(x.topk_method == "hash" for x in mixtures)
    for i, experts in enumerate(mixtures):
        fixed(experts, _TYPE, topk_method="hash" if i < hashed else "noaux_tc")
        fixed(experts, _TYPE, n_group=1, topk_group=1, norm_topk_prob=True)
        fixed(experts, _TYPE, router_bias=False, expert_bias=False)
        fixed(experts, _TYPE, **{name: getattr(first, name) for name in shared})
    activation = first.activation
    if activation is None or (activation.alpha, activation.offset) != (1.0, 0.0):
        raise ValueError(f"{_TYPE} has a clamped activation with alpha=1.0 and offset=0.0, not {activation}")
    return {
        **{name: getattr(first, name) for name in shared if name != "activation"},
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "swiglu_limit": activation.limit,
        "num_hash_layers": hashed,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (len(mixtures) - hashed),
    }
