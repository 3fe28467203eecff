"""Liger-Kernel's ops as peers, where it is installed: `pip install --no-deps liger-kernel`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

NAME = "Liger-Kernel"


def liger_peers(op: str, device: str) -> dict[str, Callable[..., Tensor]]:
    """Its form of `op`, if it has one that runs on `device`."""
    if device == "cpu" or find_spec("liger_kernel") is None:
        return {}
    return {NAME: peer} if (peer := PEERS.get(op)) is not None else {}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction,
    )

    return LigerFusedLinearCrossEntropyFunction.apply(input, linear_weight, target)[0]


def moe_mlp(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    return LigerFusedMoEFunction.apply(x, w13, w2, indices.to(torch.int32), weights)


PEERS = {"rms_norm": rms_norm, "linear_cross_entropy": linear_cross_entropy, "moe_mlp": moe_mlp}
