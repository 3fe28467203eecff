"""An operand on another device is refused in one line: some of torch's products would take it and write nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench_kernels import (
    causal_attention,
    grouped_mm,
    linear_cross_entropy,
    mla_attention,
    mla_decode,
    moe_mlp,
    moe_route,
    rms_norm,
    rope,
    scaled_mm_blockwise,
    sparse_select,
)

ENDS = torch.tensor([1, 3], dtype=torch.int32)
FP8 = torch.zeros(3, 4).to(torch.float8_e4m3fn)
HEADS = torch.ones(1, 3, 2, 4)
# What an op is called with, by name; every operand but the first is moved in turn.
CALLS: list[tuple[Callable, dict]] = [
    (rms_norm, {"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": 1e-6}),
    (rope, {"x": HEADS, "cos": torch.ones(3, 2), "sin": torch.ones(3, 2), "interleaved": True}),
    (
        moe_route,
        {"logits": torch.ones(3, 4), "num_experts_per_tok": 2, "scoring_func": "sigmoid", "bias": torch.ones(4)},
    ),
    (
        grouped_mm,
        {
            "x": torch.ones(3, 4), "weight": torch.ones(2, 5, 4), "offs": ENDS, "bias": torch.ones(2, 5),
            "gather_idx": torch.arange(3), "scatter_idx": torch.arange(3), "row_scale": torch.ones(3),
        },
    ),
    (
        moe_mlp,
        {
            "x": torch.ones(3, 4), "w13": torch.ones(2, 6, 4), "w2": torch.ones(2, 4, 3),
            "indices": torch.zeros(3, 1, dtype=torch.int64), "weights": torch.ones(3, 1),
            "b13": torch.ones(2, 6), "b2": torch.ones(2, 4),
        },
    ),
    (
        scaled_mm_blockwise,
        {"a": FP8, "b": FP8, "scale_a": torch.ones(3, 1), "scale_b": torch.ones(1, 1), "out_dtype": torch.float32},
    ),
    (
        causal_attention,
        {"query": HEADS, "key": HEADS, "value": HEADS, "scale": 1.0, "sinks": torch.ones(2)},
    ),
    (
        sparse_select,
        {"query": HEADS, "key": torch.ones(1, 3, 4), "weight": torch.ones(1, 3, 2), "index_topk": 2},
    ),
    (
        linear_cross_entropy,
        {"input": torch.ones(3, 4), "linear_weight": torch.ones(5, 4), "target": torch.arange(3)},
    ),
    (
        mla_decode,
        {
            "q_nope": HEADS, "q_rope": HEADS, "kv_cache": torch.ones(2, 4, 8),
            "block_table": torch.zeros(1, 1, dtype=torch.int32), "cache_seqlens": torch.tensor([4], dtype=torch.int32),
            "softmax_scale": 1.0,
        },
    ),
    (
        mla_attention,
        {
            "q_nope": HEADS, "q_rope": HEADS, "k_nope": HEADS, "k_rope": torch.ones(1, 3, 4), "value": HEADS,
            "softmax_scale": 1.0, "sinks": torch.ones(2), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        },
    ),
]  # fmt: skip
MOVED = [
    pytest.param(op, operands, name, id=f"{op.__name__} {name}")
    for op, operands in CALLS
    for name in [name for name, x in operands.items() if isinstance(x, Tensor)][1:]
]


@pytest.mark.parametrize(("op", "operands", "name"), MOVED)
def test_refuses_an_operand_on_another_device(op: Callable, operands: dict, name: str) -> None:
    op(**operands)
    with pytest.raises(ValueError, match=f"^{name} lies on meta and must lie on cpu, as the first operand does$"):
        op(**{**operands, name: operands[name].to("meta")})
