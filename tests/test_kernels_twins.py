"""Every Triton twin: `tests/twins/<op>.py`, run by Triton's interpreter and, where there is one, on a GPU.

Triton reads TRITON_INTERPRET when it is imported, so each runs in a pytest of its own. By hand:
`TRITON_INTERPRET=1 pytest tests/twins/rope.py`. A GPU needs torch, triton, numpy and pytest, and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workbench_kernels.tier import FUSED_OPS

TWINS = Path(__file__).parent / "twins"


def assert_passes(file: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    ran = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout and " skipped" not in ran.stdout, ran.stdout


@pytest.mark.parametrize("op", sorted(FUSED_OPS))
def test_passes_in_the_interpreter(op: str) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert_passes(TWINS / f"{op}.py", TRITON_INTERPRET="1")


def test_a_run_passes_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    for package in ("jaxtyping", "tokenizers"):
        pytest.importorskip(package, reason="only what the kernels need is installed")
    assert_passes(TWINS.parent / "run_by_twins.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")
@pytest.mark.parametrize("op", sorted(FUSED_OPS))
def test_passes_on_a_gpu(op: str) -> None:
    assert_passes(TWINS / f"{op}.py")


def test_every_twin_has_its_file() -> None:
    assert {path.stem for path in TWINS.glob("*.py")} == FUSED_OPS


@pytest.mark.parametrize("op", sorted(FUSED_OPS))
def test_every_kernel_has_a_mutation_that_its_tests_see(op: str) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from workbench_kernels.fused.cases import all_cases

    text = (TWINS / f"{op}.py").read_text(encoding="utf-8")
    kernels = {case.kernel.__name__ for case in all_cases()[op]}
    assert kernels and all(f'Mutation("{kernel}"' in text for kernel in kernels)
