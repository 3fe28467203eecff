"""Every kernel in every configuration that a launcher can choose."""

from workbench_kernels.fused import mla_attention, rms_norm, rope
from workbench_kernels.fused.ahead_of_time import Case


def all_cases(kind: str = "bf16") -> dict[str, list[Case]]:
    """The cases of each op with a Triton twin, for tensors of one Triton type: "bf16", "fp16" or "fp32"."""
    return {
        "mla_attention": mla_attention.cases(kind),
        "rms_norm": rms_norm.cases(kind),
        "rope": rope.cases(kind),
    }
