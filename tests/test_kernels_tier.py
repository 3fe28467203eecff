"""When an op may skip the dispatcher: only where nobody would see the difference."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from workbench_kernels import rms_norm
from workbench_kernels.tier import resolve, unwatched, using


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


CPU = torch.device("cpu")


def test_a_run_chooses_for_all_ops_that_are_left_to_auto() -> None:
    assert resolve("rms_norm", "auto", CPU, torch.float32) == "torch"
    with using("reference"):
        assert resolve("rms_norm", "auto", CPU, torch.float32) == "reference"
        with using("auto"):
            assert resolve("rms_norm", "auto", CPU, torch.float32) == "torch"
        assert resolve("rms_norm", "auto", CPU, torch.float32) == "reference"
    with using("fused"), pytest.raises(ValueError, match="only with TRITON_INTERPRET=1"):
        rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6)
    with pytest.raises(ValueError, match="impl='fast'"), using("fast"):
        pass
    assert resolve("rms_norm", "auto", CPU, torch.float32) == "torch"


def test_other_threads_are_left_alone() -> None:
    found = []
    with using("reference"):
        thread = threading.Thread(target=lambda: found.append(resolve("rms_norm", "auto", CPU, torch.float32)))
        thread.start()
        thread.join()
    assert found == ["torch"]


def test_what_is_compiled_keeps_the_choice() -> None:
    def normed(x: Tensor) -> Tensor:
        return rms_norm(x, torch.ones(8), 1e-6)

    x = torch.randn(2, 8)
    with using("reference"):
        torch.testing.assert_close(torch.compile(normed, backend="aot_eager", fullgraph=True)(x), normed(x))
