"""The sparse attention of `transformers`' DeepSeek-V3.2 with our weights, in the dtype of those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV32Config
from wide_reference import modeling, rope_functions

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
    block: SparseLatentAttention, latent: LatentAttention, implementation: str = "sdpa", *, settle_ties: bool = False
) -> Any:
    """The reference module holding exactly the weights of `block`: the names of all of them are the same."""
    dtype = block.o_proj.weight.dtype
    module = modeling("deepseek_v32", dtype, settle_ties=settle_ties)
    peer = module.DeepseekV32Attention(reference_config(block, latent, implementation), 0)
    peer.load_state_dict(block.state_dict())
    return peer.to(dtype).eval()


def reference_output(peer: Any, x: Tensor) -> Tensor:
    """What the reference makes of whole sequences from position 0."""
    with rope_functions(x.dtype):
        rotary = modeling("deepseek_v32", x.dtype).DeepseekV32RotaryEmbedding(peer.config)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
    if peer.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    with torch.no_grad():
        return peer(x, rotary(x, torch.arange(x.shape[1])[None]), mask)[0]
