"""What the configurations of several neighbours share."""

from __future__ import annotations

from dataclasses import replace

from workbench.model.config import GroupedQueryAttention, MixtureOfExperts, require
from workbench.model.hf_read.fields import Fields, no_partial_rotation, read_rope, rope_fields

FULL, SLIDING = "full_attention", "sliding_attention"


def grouped(
    fields: Fields,
    hidden_size: int,
    max_position_embeddings: int,
    *,
    heads: int,
    key_value_heads: int | None,
    head_dim: int | None = None,
    rope_theta: float = 10_000.0,
    rope: dict | None = None,
    turns_whole_heads: bool = True,
) -> GroupedQueryAttention:
    """Grouped-query attention; the keyword arguments are what the class assumes where the file says nothing."""
    num_heads = fields.integer("num_attention_heads", default=heads)
    require(num_heads > 0, f"num_attention_heads={num_heads} must be above 0")
    said = rope_fields(fields, rope)
    if turns_whole_heads:
        no_partial_rotation(fields, said)
    return GroupedQueryAttention(
        num_attention_heads=num_heads,
        num_key_value_heads=fields.optional_integer("num_key_value_heads", default=key_value_heads) or num_heads,
        head_dim=fields.optional_integer("head_dim", default=head_dim) or hidden_size // num_heads,
        rope=read_rope(fields, said, max_position_embeddings=max_position_embeddings, rope_theta=rope_theta),
    )


def by_layer(
    fields: Fields,
    attention: GroupedQueryAttention,
    num_layers: int,
    sliding_window: int | None,
    *,
    max_window_layers: int = 0,
    otherwise: list[str] | None = None,
) -> list[GroupedQueryAttention]:
    """The attention of every layer, full or sliding: as `layer_types` says, or `otherwise`, or by layer number."""
    first = fields.integer("max_window_layers", default=max_window_layers, null=max_window_layers)
    kinds = fields.names("layer_types", (FULL, SLIDING), num_layers) or otherwise
    if kinds is None:
        kinds = [SLIDING if sliding_window is not None and i >= first else FULL for i in range(num_layers)]
    require(
        SLIDING not in kinds or sliding_window is not None,
        f"layer_types has {SLIDING}, but there is no sliding_window ({fields.owner})",
    )
    sliding = replace(attention, sliding_window=sliding_window)
    return [sliding if kind == SLIDING else attention for kind in kinds]


def softmax_experts(
    fields: Fields, *, moe_intermediate_size: int, n_routed_experts: int, num_experts_per_tok: int, norm_topk_prob: bool
) -> MixtureOfExperts:
    """The best of a softmax, without groups, bias or shared experts."""
    return MixtureOfExperts(
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=num_experts_per_tok),
        moe_intermediate_size=moe_intermediate_size,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=norm_topk_prob,
    )


def sigmoid_experts(
    fields: Fields, *, n_routed_experts: int, num_experts_per_tok: int, n_shared_experts: int, norm_topk_prob: bool
) -> MixtureOfExperts:
    """V3's routing with the defaults that GLM-4.5 and dots.llm1 share; groups that are null are one group."""
    fields.only("scoring_func", "sigmoid", "noaux_tc")
    fields.only("topk_method", "noaux_tc")
    return MixtureOfExperts(
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=fields.integer("moe_intermediate_size", default=1408),
        n_shared_experts=n_shared_experts,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=fields.integer("n_group", default=1, null=1),
        topk_group=fields.integer("topk_group", default=1, null=1),
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
    )
