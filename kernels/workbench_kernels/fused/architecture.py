"""Which of the targets that kernels are compiled for a device is, so that a launcher can choose its tile."""

import torch
import triton

from workbench_kernels.fused.interpreter import interpreting

# Later ones keep more in registers, where the widest tiles of earlier ones spill.
TRITON_BEFORE_3_8 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
MULTIPLIES_E4M3 = ("sm_90", "sm_100")  # others have no instruction for float8_e4m3fn


def architecture_of(device: torch.device) -> str:
    """One of `ahead_of_time.SHARED_LIMIT`: "sm_80", "sm_90", "sm_100" or "gfx942".

    The interpreter takes the tiles of sm_90. A GPU with less shared memory than a data centre's of its generation takes
    those of gfx942, which has the least.
    """
    if interpreting():
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None or properties.shared_memory_per_block_optin < 160 * 1024:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100")


def precision_of(itemsize: int, architecture: str) -> str:
    """How numbers of so many bytes are multiplied: float32 by NVIDIA's matrix units in three parts, all else as is."""
    return "tf32x3" if itemsize == 4 and architecture != "gfx942" else "ieee"
