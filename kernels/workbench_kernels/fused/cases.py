"""Every kernel in every configuration that a launcher can choose."""

from importlib import import_module

from workbench_kernels.fused.ahead_of_time import Case
from workbench_kernels.tier import FUSED_OPS


def all_cases() -> dict[str, list[Case]]:
    """The cases of each op with a Triton twin, in bfloat16."""
    return {op: import_module(f"workbench_kernels.fused.{op}").cases() for op in sorted(FUSED_OPS)}
