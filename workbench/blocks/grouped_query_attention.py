"""Grouped-query attention: several query heads read one key/value head."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from workbench.blocks.cache import KeyValueCache
from workbench.blocks.rope import Rotation
from workbench_kernels.causal_attention import causal_attention


class GroupedQueryAttention(nn.Module):
    """Causal attention with `num_key_value_heads` heads of keys and values.

    As many of them as query heads is multi-head attention, a single one is multi-query attention. `rotate` is the RoPE
    layout, one of `rope.rotate_halves` and `rope.rotate_interleaved`.

    Source: Ainslie et al., arXiv 2305.13245.
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
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.softmax_scale = softmax_scale
        self.rotate = rotate
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], turn: Rotation, cache: KeyValueCache | None = None
    ) -> Float[Tensor, "B T D"]:
        query_BTHK, key_BTGK, value_BTGK = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_BTHK, key_BTGK = self.rotate(query_BTHK, turn), self.rotate(key_BTGK, turn)
        key_BSGK, value_BSGK = (key_BTGK, value_BTGK) if cache is None else cache.append(key_BTGK, value_BTGK)
        mixed_BTHK = causal_attention(query_BTHK, key_BSGK, value_BSGK, self.softmax_scale)
        return self.o_proj(mixed_BTHK.flatten(-2))
