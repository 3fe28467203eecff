"""Which form of an op runs. Every op asks here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch._C import _is_tracing, _len_torch_dispatch_stack

Tier = Literal["reference", "torch", "fused"]

# Ops with a Triton twin in fused/.
FUSED_OPS = frozenset(
    {
        "grouped_mm",
        "linear_cross_entropy",
        "mla_attention",
        "mla_decode",
        "moe_mlp",
        "moe_route",
        "quantize_blockwise",
        "rms_norm",
        "rope",
        "scaled_mm_blockwise",
        "sparse_select",
    }
)
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("auto", "reference", "fused")
_in_place_of_auto: ContextVar[str] = ContextVar("_in_place_of_auto", default="auto")


@contextmanager
def using(impl: str) -> Iterator[None]:
    """Within it, in this thread, every op that is left to "auto" runs as `impl` says: a run chooses for all its ops.

    `torch.compile` asks once: what it has compiled goes on as was said then.

    Raises:
        ValueError: `impl` is unknown.
    """
    _require_impl(impl)
    token = _in_place_of_auto.set(impl)
    try:
        yield
    finally:
        _in_place_of_auto.reset(token)


def resolve(op: str, impl: str, device: torch.device, dtype: torch.dtype, *, fits: bool = True) -> Tier:
    """Turn the caller's `impl` into the form of `op` that runs on `device`.

    `auto` is what `using` says, or else the fast torch form on a CPU; elsewhere the Triton twin, and the definition
    where there can be none: of an op that has no twin yet, in a dtype that twins do not take, of sizes that this twin
    does not take (`fits=False`), or on a system without Triton.
    `reference` is the definition anywhere; `fused` is the Triton twin, on a CPU only inside Triton's interpreter.

    Raises:
        ValueError: `impl` is unknown, or the form it names cannot run here. Another form is never taken instead.
    """
    impl = asked(impl)
    if impl == "reference":
        return "reference"
    if impl == "auto" and device.type == "cpu":
        return "torch"
    has_twin = op in FUSED_OPS and dtype in FUSED_DTYPES and fits and find_spec("triton") is not None
    if impl == "auto" and not (has_twin and device.type == "cuda"):
        return "reference"
    if op not in FUSED_OPS:
        raise ValueError(f"{op} has no fused tier yet; pass impl='auto' or 'reference'")
    if find_spec("triton") is None:
        raise ValueError(f"the fused tier of {op} needs Triton, which is not installed; pass impl='reference'")
    if device.type == "cpu" and not _interpreting():
        raise ValueError(f"the fused tier of {op} runs on a CPU only with TRITON_INTERPRET=1 set before Python starts")
    return "fused"


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether an op may call its body itself, as no gradient is recorded, nothing traces and no subclass looks on.

    The dispatcher's way through a custom op costs about ten microseconds, as much as a small op itself.
    """
    if torch.compiler.is_compiling() or _is_tracing() or _len_torch_dispatch_stack() > 0:
        return False
    recording = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not (recording and t.requires_grad)) for t in tensors)


_PLAIN = (Tensor, nn.Parameter)


def check_devices(first: Tensor, **others: Tensor | None) -> None:
    """Refuse operands that lie on several devices: some products take them and write nothing.

    Raises:
        ValueError: one of `others` lies elsewhere than `first`.
    """
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name} lies on {x.device} and must lie on {first.device}, as the first operand does")


def asked(impl: str) -> str:
    """What the caller of an op or, where that is "auto", `using` asks for.

    Raises:
        ValueError: `impl` is unknown.
    """
    _require_impl(impl)
    return _told() if impl == "auto" else impl


def _require_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} must be 'auto', 'reference' or 'fused'")


@torch.compiler.assume_constant_result
def _told() -> str:
    return _in_place_of_auto.get()


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    from workbench_kernels.fused.interpreter import interpreting

    return interpreting()
