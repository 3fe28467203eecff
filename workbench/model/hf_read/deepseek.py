"""The published configurations of the DeepSeek line, V2 to V4, and of those that share its classes."""

from __future__ import annotations

from workbench.model.config import (
    DenseFeedForward,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    SparseLatentAttention,
)
from workbench.model.hf_read.fields import Fields, common, no_partial_rotation, read_rope, rope_fields


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
