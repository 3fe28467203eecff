"""When an op may skip the dispatcher: only where nobody would see the difference."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import workbench_kernels
from workbench_kernels import causal_attention, mla_attention, rms_norm
from workbench_kernels.tier import FUSED_OPS, resolve, unwatched, using


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


def test_attention_too_is_its_definition_where_a_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU "auto" is no Triton twin for all of it, and yet not the definition: only who asks for that gets it."""
    q, rope = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 4)
    attentions = (
        (causal_attention, lambda: causal_attention(q, q, q, 0.5)),
        (mla_attention, lambda: mla_attention(q, rope, q, rope[:, :, 0], q, 0.5)),
    )
    for op, attention in attentions:
        monkeypatch.setattr(sys.modules[op.__module__], "reference", lambda *_, **__: torch.ones(1))
        with using("reference"):
            assert attention().numel() == 1
        assert attention().shape == q.shape


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


def test_twins_launch_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of a twin that an op calls enters it, which Triton does not do by itself."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from workbench_kernels.fused.on_its_device import on_its_device

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or nullcontext())
    x = torch.ones(1)
    assert on_its_device(lambda tensor, y: (tensor, y))(x, 2) == (x, 2) and entered == [x]

    package = Path(workbench_kernels.__file__).parent
    for op in FUSED_OPS | {"expert_tiles"}:
        called = set(re.findall(r"twin\.(\w+)\(", (package / f"{op}.py").read_text(encoding="utf-8")))
        twin = importlib.import_module(f"workbench_kernels.fused.{op}")
        assert called and all(hasattr(getattr(twin, name), "__wrapped__") for name in called), op
