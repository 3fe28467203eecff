"""When an op may skip the dispatcher: only where nobody would see the difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from workbench_kernels.tier import unwatched


def test_plain_tensors_are_unwatched_where_no_gradient_is_recorded() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert unwatched(torch.ones(2), None)
    assert not unwatched(torch.ones(2), weight)
    with torch.no_grad():
        assert unwatched(torch.ones(2), weight)
    with torch.inference_mode():
        assert unwatched(torch.ones(2), weight)


def test_who_looks_on_is_seen() -> None:
    with FakeTensorMode():
        assert not unwatched(torch.ones(2))
    with FlopCounterMode(display=False):
        assert not unwatched(torch.ones(2))

    seen = []

    def traced(x: Tensor) -> Tensor:
        seen.append(unwatched(x))
        return x + 1

    torch.jit.trace(traced, torch.ones(2))
    assert not seen[0], "later calls compare, and trace nothing"
