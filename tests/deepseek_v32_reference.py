"""The sparse attention of `transformers`' DeepSeek-V3.2 with our weights, and its float32 casts lifted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32Attention,
    DeepseekV32RotaryEmbedding,
    apply_rotary_pos_emb,
)

from workbench.blocks.sparse_latent_attention import SparseLatentAttention
from workbench.model.attention_config import LatentAttention, Yarn


def reference_config(
    block: SparseLatentAttention, latent: LatentAttention, implementation: str = "sdpa"
) -> DeepseekV32Config:
    """The published form of what `block` was built from."""
    assert latent.q_lora_rank is not None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": latent.rope.rope_theta}
    if (yarn := latent.rope.scaling) is not None:
        assert isinstance(yarn, Yarn)
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope |= {"rope_type": "yarn", **{name: getattr(yarn, name) for name in names}}
    config = DeepseekV32Config(
        hidden_size=block.o_proj.out_features,
        num_attention_heads=latent.num_attention_heads,
        num_key_value_heads=latent.num_attention_heads,
        q_lora_rank=latent.q_lora_rank,
        kv_lora_rank=latent.kv_lora_rank,
        qk_nope_head_dim=latent.qk_nope_head_dim,
        qk_rope_head_dim=latent.qk_rope_head_dim,
        v_head_dim=latent.v_head_dim,
        index_n_heads=block.indexer.weights_proj.out_features,
        index_head_dim=block.indexer.wk.out_features,
        index_topk=block.index_topk,
        rope_parameters=rope,
        max_position_embeddings=192,
    )
    config._attn_implementation = implementation
    return config


def reference_with_weights_of(
    block: SparseLatentAttention, latent: LatentAttention, implementation: str = "sdpa"
) -> Any:
    """The reference module holding exactly the weights of `block`: the names of all of them are the same."""
    peer = DeepseekV32Attention(reference_config(block, latent, implementation), 0)
    peer.load_state_dict(block.state_dict())
    return peer.to(block.o_proj.weight.dtype).eval()


def reference_output(peer: Any, x: Tensor) -> Tensor:
    """What the reference makes of whole sequences from position 0, with its own angles (float32)."""
    return with_angles(peer, x, DeepseekV32RotaryEmbedding(peer.config)(x, torch.arange(x.shape[1])[None]))


def with_angles(peer: Any, x: Tensor, cos_and_sin: tuple[Tensor, Tensor]) -> Tensor:
    """What the reference makes of whole sequences, given cosines and sines [1, T, R]."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
    if peer.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    with torch.no_grad():
        return peer(x, cos_and_sin, mask)[0]


def lift_float32_casts(peer: Any) -> None:
    """Let a reference already cast to float64 compute in it throughout, and choose the lowest index of equal scores.

    Its norms and its indexer cast to float32 by name. Its indexer leaves ties to `torch.topk`, whose order follows
    neither index nor value and changes with the number of keys: there it is at fault, and the order is replaced. (With
    two index heads, 3 to 7 keys of 33, its outputs for 32 tokens moved by up to 0.3 to 0.5 when a 33rd followed them.)
    """
    for module in peer.modules():
        if type(module).__name__ == "DeepseekV32RMSNorm":
            module.forward = _float64_norm(module)
    peer.indexer.forward = _float64_indexer(peer.indexer)


def _float64_norm(norm):
    def forward(x):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    return forward


def _float64_indexer(indexer):
    def forward(x, compressed, angles, mask, position_ids, past_key_values=None):
        query = indexer.wq_b(compressed).unflatten(-1, (indexer.n_heads, indexer.head_dim))
        key = indexer.k_norm(indexer.wk(x))[:, :, None]
        rotary = indexer.qk_rope_head_dim
        turned = apply_rotary_pos_emb(query[..., :rotary], key[..., :rotary], *angles, unsqueeze_dim=2)
        query, key = (
            torch.cat((part, whole[..., rotary:]), -1) for part, whole in zip(turned, (query, key), strict=True)
        )
        matches = torch.relu(query.transpose(1, 2) @ key.transpose(1, 2).mT) * indexer.softmax_scale
        scores = (matches * indexer.weights_proj(x).mT[..., None] * indexer.n_heads**-0.5).sum(1)
        order = scores.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return order[..., : indexer.index_topk].int()

    return forward
