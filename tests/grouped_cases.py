"""Inputs that every tier of grouped_mm is tested with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench_kernels import GatedActivation, grouped_mm

NAN = float("nan")
# Which of the options are given; an activation doubles the rows of the weight.
OPTIONS: dict[str, set[str]] = {
    "gather": {"gather_idx"},
    "scatter": {"scatter_idx"},
    "bias": {"bias"},
    "scale": {"row_scale"},
    "activation": {"activation"},
    "all": {"gather_idx", "scatter_idx", "bias", "row_scale", "activation"},
}
CLAMPED = GatedActivation(1.0, 1.702, 1.0)


def make(
    sizes: list[int], k: int, n: int, dtype: torch.dtype, unowned: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of groups of these sizes and some that no expert owns, weights, and ends."""
    torch.manual_seed(0)
    offs = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(sizes) + unowned, k)
    x[sum(sizes) :] = NAN
    return x.to(device, dtype), torch.randn(len(sizes), n, k).to(device, dtype), offs.to(device)


def make_with_options(
    sizes: list[int], k: int, n: int, dtype: torch.dtype, name: str, device: str = "cpu", impl: str = "auto"
) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Floating inputs, the op with these options as a function of them, and its definition."""
    given = OPTIONS[name]
    gated = "activation" in given
    x, weight, offs = make(sizes, k, 2 * n if gated else n, dtype, 2, device)
    num_rows = len(x)
    indices = {}
    if "gather_idx" in given:
        x = torch.randn(4, k).to(device, dtype)
        indices["gather_idx"] = torch.randint(4, (num_rows,), dtype=torch.int32).to(device)
    if "scatter_idx" in given:
        indices["scatter_idx"] = torch.randperm(num_rows).to(device)
    floating = {}
    if "bias" in given:
        floating["bias"] = torch.randn(weight.shape[:2]).to(device, dtype)
    if "row_scale" in given:
        floating["row_scale"] = torch.randn(num_rows).to(device, dtype)
    activation = CLAMPED if gated else None

    def call(x: Tensor, weight: Tensor, *others: Tensor, impl: str) -> Tensor:
        options = dict(zip(floating, others, strict=True))
        return grouped_mm(x, weight, offs, **options, **indices, activation=activation, impl=impl)

    return [x, weight, *floating.values()], partial(call, impl=impl), partial(call, impl="reference")
