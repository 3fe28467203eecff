"""Break a Triton twin on purpose: a test that cannot see it proves nothing."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest


class Mutation(NamedTuple):
    """One mask, scale, sign or index of a kernel, and what stands in its place instead."""

    kernel: str
    right: str
    wrong: str


def assert_seen(twin: str, mutation: Mutation, folder: Path, proof: Callable[[], None]) -> None:
    """`proof`, a test that passes with the twin `fused/<twin>.py` as it is, fails with the mutated one."""
    with mutated(twin, mutation, folder), pytest.raises(AssertionError):
        proof()


@contextmanager
def mutated(twin: str, mutation: Mutation, folder: Path) -> Iterator[None]:
    """Let `fused/<twin>.py` launch a kernel in which `right`, found exactly once, is `wrong`."""
    from triton import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    original = importlib.import_module(f"workbench_kernels.fused.{twin}")
    text = Path(inspect.getfile(original)).read_text(encoding="utf-8")
    before, start, kernel = text.partition(f"def {mutation.kernel}(")
    body, *rest = kernel.split("\n@triton.jit", 1)
    assert start and body.count(mutation.right) == 1, f"{mutation.right!r} must stand once in {mutation.kernel}"
    path = folder / f"{twin}.py"
    path.write_text(
        before + start + "\n@triton.jit".join([body.replace(mutation.right, mutation.wrong), *rest]), encoding="utf-8"
    )
    spec = importlib.util.spec_from_file_location(f"mutated_{twin}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        # All of them: on a GPU a kernel keeps what it has compiled, whatever the function that it calls is now.
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction | InterpretedFunction) and kernel.fn.__module__ == module.__name__:
                patch.setattr(original, name, kernel)
        yield
