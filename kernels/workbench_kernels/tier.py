"""Which form of an op runs. Every op asks here and nowhere else."""

from importlib.util import find_spec
from typing import Literal

import torch

Tier = Literal["reference", "torch", "fused"]

FUSED_OPS = frozenset({"rms_norm"})  # ops with a Triton twin in fused/


def resolve(op: str, impl: str, device: torch.device) -> Tier:
    """Turn the caller's `impl` into the form of `op` that runs on `device`.

    `auto` is the fast torch form on a CPU, and elsewhere the Triton twin, or the definition of an op that has none yet;
    `reference` is the definition anywhere; `fused` is the Triton twin, on a CPU only inside Triton's interpreter.

    Raises:
        ValueError: `impl` is unknown, or the form it names cannot run here. Another form is never taken instead.
    """
    if impl not in ("auto", "reference", "fused"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'reference' or 'fused'")
    if impl == "reference":
        return "reference"
    if impl == "auto" and device.type == "cpu":
        return "torch"
    if op not in FUSED_OPS:
        if impl == "auto":
            return "reference"
        raise ValueError(f"{op} has no fused tier yet; pass impl='auto' or 'reference'")
    if find_spec("triton") is None:
        raise ValueError(f"the fused tier of {op} needs Triton, which is not installed; pass impl='reference'")
    if device.type == "cpu" and not _interpreting():
        raise ValueError(f"the fused tier of {op} runs on a CPU only with TRITON_INTERPRET=1 set before Python starts")
    return "fused"


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    from workbench_kernels.fused.interpreter import interpreting

    return interpreting()
