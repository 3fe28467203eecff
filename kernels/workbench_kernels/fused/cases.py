"""Every kernel in every configuration that a launcher can choose."""

from workbench_kernels.fused import (
    grouped_mm,
    linear_cross_entropy,
    mla_attention,
    mla_decode,
    moe_mlp,
    moe_route,
    quantize_blockwise,
    rms_norm,
    rope,
    scaled_mm_blockwise,
    sparse_select,
)
from workbench_kernels.fused.ahead_of_time import Case

CASES_OF = {
    "grouped_mm": grouped_mm.cases,
    "linear_cross_entropy": linear_cross_entropy.cases,
    "mla_attention": mla_attention.cases,
    "mla_decode": mla_decode.cases,
    "moe_mlp": moe_mlp.cases,
    "moe_route": moe_route.cases,
    "quantize_blockwise": quantize_blockwise.cases,
    "rms_norm": rms_norm.cases,
    "rope": rope.cases,
    "scaled_mm_blockwise": scaled_mm_blockwise.cases,
    "sparse_select": sparse_select.cases,
}


def all_cases(kind: str = "bf16") -> dict[str, list[Case]]:
    """The cases of each op with a Triton twin, for tensors of one Triton type: "bf16", "fp16" or "fp32"."""
    return {op: cases(kind) for op, cases in CASES_OF.items()}
