"""Compile a kernel for a GPU that is not there, and read what it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as its launcher would compile it."""

    name: str
    kernel: Any  # a function under triton.jit
    arguments: dict[str, str]  # run-time argument -> Triton type ("*bf16", "i32")
    constants: dict[str, Any]
    num_warps: int

    @property
    def tile(self) -> str:
        """The sizes of the tile, in the order of the kernel's arguments."""
        return " x ".join(str(value) for name, value in self.constants.items() if name.startswith("BLOCK"))

    def retyped(self, kind: str) -> Case:
        """The same for tensors of another Triton type in the place of bfloat16."""
        arguments = {name: old.replace("*bf16", f"*{kind}") for name, old in self.arguments.items()}
        return replace(self, name=f"{self.name} {kind}", arguments=arguments)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; `spills` in bytes on NVIDIA, in registers on AMD.

    `matrix_instructions` counts those of the matrix units in its text: of whole groups of warps alone on sm_90.
    """

    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: int


def compile_case(case: Case, architecture: str) -> Usage:
    """Compile for one of `SHARED_LIMIT`'s architectures; needs neither GPU nor driver, and no interpreter."""
    types = {name: "constexpr" if name in case.constants else case.arguments[name] for name in case.kernel.arg_names}
    # The launcher promises that pointers are 16-byte aligned, as torch's allocations are.
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(types) if types[name].startswith("*")
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constants, attrs=attributes)
    compiled = triton.compile(source, target=_target(architecture), options={"num_warps": case.num_warps})
    registers, spills = _amd(compiled) if architecture.startswith("gfx") else _nvidia(compiled)
    text, instruction = ("amdgcn", "v_mfma") if architecture.startswith("gfx") else ("ptx", MATRIX[architecture])
    return Usage(registers, spills, compiled.metadata.shared, compiled.asm[text].count(instruction))


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _nvidia(compiled: Any) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])  # spilled registers lie on the stack


def _amd(compiled: Any) -> tuple[int, int]:
    found = {
        key: int(number)
        for key, number in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]
        )
    }
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
