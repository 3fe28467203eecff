"""Liger-Kernel's ops as peers, where it is installed: `pip install --no-deps liger-kernel`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

NAME = "Liger-Kernel"


def liger_peers(op: str, device: str, eps: float = 0.0) -> dict[str, Callable[..., Tensor]]:
    """Its form of `op`, if it has one that runs on `device`; `eps` is that of a norm."""
    if device == "cpu" or find_spec("liger_kernel") is None:
        return {}
    if op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

        return {NAME: lambda x, weight: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)}
    if op == "linear_cross_entropy":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # pyright: ignore[reportMissingImports]

        return {NAME: lambda *inputs: LigerFusedLinearCrossEntropyFunction.apply(*inputs)[0]}
    if op == "moe_mlp":
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

        def moe_mlp(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            return LigerFusedMoEFunction.apply(x, w13, w2, indices.to(torch.int32), weights)

        return {NAME: moe_mlp}
    return {}
