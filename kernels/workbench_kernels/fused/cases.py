"""Every kernel in every configuration that a launcher can choose."""

from workbench_kernels.fused import quantize_blockwise, rms_norm, rope, scaled_mm_blockwise
from workbench_kernels.fused.ahead_of_time import Case


def all_cases(kind: str = "bf16") -> dict[str, list[Case]]:
    """The cases of each op with a Triton twin, for tensors of one Triton type: "bf16", "fp16" or "fp32"."""
    return {
        "quantize_blockwise": quantize_blockwise.cases(kind),
        "rms_norm": rms_norm.cases(kind),
        "rope": rope.cases(kind),
        "scaled_mm_blockwise": scaled_mm_blockwise.cases(kind),
    }
