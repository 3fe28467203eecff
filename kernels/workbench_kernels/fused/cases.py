"""Every kernel in every configuration that a launcher can choose."""

from workbench_kernels.fused import rms_norm, rope
from workbench_kernels.fused.ahead_of_time import Case


def all_cases() -> dict[str, list[Case]]:
    """The cases of each op with a Triton twin, in bfloat16."""
    return {"rms_norm": rms_norm.cases(), "rope": rope.cases()}
