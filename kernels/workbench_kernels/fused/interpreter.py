"""Whether Triton interprets kernels in this process."""

import torch
import triton
import triton.language as tl


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET=1` was set before Triton was imported: Triton decorates its own functions then."""
    return not isinstance(tl.zeros, triton.JITFunction)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what a twin cannot compute faithfully.

    Raises:
        ValueError: `dtype` is none of float32, float16 and bfloat16, or is bfloat16 in the interpreter, which
            truncates where a GPU rounds.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the fused tier takes float32, float16 or bfloat16, not {dtype}")
    if dtype == torch.bfloat16 and interpreting():
        raise ValueError("Triton's interpreter rounds bfloat16 wrongly; run float32 or float16 in it")
