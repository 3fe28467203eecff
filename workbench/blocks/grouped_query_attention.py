"""Grouped-query attention: several query heads read one key/value head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.blocks.cache import KeyValueCache
from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench.blocks.sliding_cache import SlidingKeyValueCache
from workbench_kernels.causal_attention import causal_attention


class GroupedQueryAttention(nn.Module):
    """Causal attention with `num_key_value_heads` heads of keys and values.

    As many of them as query heads is multi-head attention, a single one is multi-query attention. `rotate` is the RoPE
    layout, one of `rope.rotate_halves` and `rope.rotate_interleaved`; it turns the leading `rotary_width` numbers of
    every query and key. `qk_norm` normalises both before: each head by itself (Qwen3, GLM-4.5) or all heads of a token
    together ("full", OLMoE), with `eps`. With `sliding_window` a query reads its own token and the window - 1 before.
    `sinks` are learned logits, one per head, that take attention and give nothing (gpt-oss).

    Source: Ainslie et al., arXiv 2305.13245; Henry et al., arXiv 2010.04245 (query-key normalisation); Beltagy et al.,
    arXiv 2004.05150 (window); Xiao et al., arXiv 2309.17453 (sinks).
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        num_key_value_heads: int,
        head_dim: int,
        softmax_scale: float,
        rotate: Callable[[Tensor, Rotation], Tensor],
        rotary_width: int,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: Literal["head", "full"] | None = None,
        sliding_window: int | None = None,
        sinks: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.softmax_scale = softmax_scale
        self.rotate = rotate
        self.rotary_widths = (rotary_width, head_dim - rotary_width)
        query_width, key_width = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=qkv_bias)
        self.o_proj = nn.Linear(query_width, hidden_size, bias=o_bias)
        self.sliding_window = sliding_window
        self.sinks = nn.Parameter(torch.empty(num_attention_heads)) if sinks else None
        self.qk_norm = qk_norm
        if qk_norm is not None:
            self.q_norm = RMSNorm(query_width if qk_norm == "full" else head_dim, eps=eps)
            self.k_norm = RMSNorm(key_width if qk_norm == "full" else head_dim, eps=eps)

    def forward(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: KeyValueCache | SlidingKeyValueCache | None = None
    ) -> Float[Tensor, "B T D"]:
        query_BTX, key_BTX = self.q_proj(x), self.k_proj(x)
        if self.qk_norm == "full":
            query_BTX, key_BTX = self.q_norm(query_BTX), self.k_norm(key_BTX)
        query_BTHK, key_BTGK, value_BTGK = (
            wide.unflatten(-1, (-1, self.head_dim)) for wide in (query_BTX, key_BTX, self.v_proj(x))
        )
        if self.qk_norm == "head":
            query_BTHK, key_BTGK = self.q_norm(query_BTHK), self.k_norm(key_BTGK)
        query_BTHK, key_BTGK = self.turned(query_BTHK, turn), self.turned(key_BTGK, turn)
        key_BSGK, value_BSGK = (key_BTGK, value_BTGK) if cache is None else cache.append(key_BTGK, value_BTGK)
        mixed_BTHK = causal_attention(
            query_BTHK, key_BSGK, value_BSGK, self.softmax_scale, window=self.sliding_window, sinks=self.sinks
        )
        return self.o_proj(mixed_BTHK.flatten(-2))

    def turned(self, x: Float[Tensor, "B T heads K"], turn: Rotation) -> Float[Tensor, "B T heads K"]:
        """`x` with the leading part of every head turned by its position."""
        if self.rotary_widths[1] == 0:
            return self.rotate(x, turn)
        moving, still = x.split(self.rotary_widths, dim=-1)
        return torch.cat((self.rotate(moving, turn), still), dim=-1)
