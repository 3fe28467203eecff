"""Compile a kernel for a GPU that is not there, and read what it uses."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

# Instructions of the matrix units: of one warp, and the target's widest, which take a whole tile.
NARROW = {"sm_80": "mma.sync", "sm_90": "mma.sync", "sm_100": "mma.sync", "gfx942": "v_mfma"}
WIDE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as its launcher would compile it on the `architectures` where it chooses it.

    `matrix` says which instructions of the matrix units its products must use, if it makes any.
    """

    name: str
    kernel: Any  # a function under triton.jit
    arguments: dict[str, str]  # run-time argument -> Triton type ("*bf16", "i32")
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None  # None: Triton's own choice
    matrix: Literal["wide", "narrow"] | None = None
    architectures: tuple[str, ...] = tuple(SHARED_LIMIT)

    @property
    def tile(self) -> str:
        """The sizes of the tile, in the order of the kernel's arguments."""
        return " x ".join(str(value) for name, value in self.constants.items() if name.startswith("BLOCK"))


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; `spills` in bytes on NVIDIA, in registers on AMD.

    `matrix_instructions` counts those of the matrix units in its text, by name; where they are `serialized`, each
    waits for the one before.
    """

    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialized: bool = False

    def faults(self, case: Case, architecture: str) -> list[str]:
        """What a kernel may not do on a target.

        Spill, ask for more shared memory than there is, multiply by hand, or let products wait for each other.
        """
        wanted = {"wide": WIDE[architecture], "narrow": NARROW[architecture], None: None}[case.matrix]
        found = [f"spills {self.spills}"] if self.spills else []
        if self.shared_bytes > SHARED_LIMIT[architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[architecture]}")
        if wanted is not None and not self.matrix_instructions.get(wanted):
            found.append(f"no {wanted}")
        if self.serialized:
            found.append("serializes its products")
        return found


def merged(cases: Iterable[Case]) -> list[Case]:
    """Of cases that differ in their targets alone, one for all these targets, where the first stood."""
    found: list[Case] = []
    for case in cases:
        for index, other in enumerate(found):
            if replace(other, architectures=case.architectures) == case:
                both = dict.fromkeys((*other.architectures, *case.architectures))
                found[index] = replace(other, architectures=tuple(both))
                break
        else:
            found.append(case)
    return found


def compile_case(case: Case, architecture: str) -> Usage:
    """Compile for one of `SHARED_LIMIT`'s architectures, and read what it uses."""
    compiled = compiled_kernel(case, architecture)
    registers, spills = _amd(compiled) if architecture.startswith("gfx") else _nvidia(compiled)
    text = compiled.asm["amdgcn" if architecture.startswith("gfx") else "ptx"]
    counts = {name: text.count(name) for name in (NARROW[architecture], WIDE[architecture])}
    serialized = "wgmma" in text and _serialized(text)
    return Usage(registers, spills, compiled.metadata.shared, {name: n for name, n in counts.items() if n}, serialized)


def compiled_kernel(case: Case, architecture: str) -> Any:
    """Triton's compiled kernel; needs neither GPU nor driver, and no interpreter."""
    types = {name: "constexpr" if name in case.constants else case.arguments[name] for name in case.kernel.arg_names}
    # The launcher promises that pointers are 16-byte aligned, as torch's allocations are.
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(types) if types[name].startswith("*")
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps} | ({} if case.num_stages is None else {"num_stages": case.num_stages})
    return triton.compile(source, target=_target(architecture), options=options)


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _nvidia(compiled: Any) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def told(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        report = told("-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", report)
        assert found is not None, report
        registers, stack_bytes = int(found[1]), int(found[2])
        # Spilled registers lie on the stack; one that is set up and never stored to holds none.
        return registers, stack_bytes if stack_bytes and "STL" in told("-sass") else 0


def _serialized(ptx: str) -> bool:
    """Whether the assembler says so: the instructions alone do not show it."""
    from triton.backends.nvidia.compiler import get_ptxas  # here: a Triton for AMD alone may lack it

    found = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assert found is not None
    assembler = get_ptxas(int(found[2])).path  # Triton brings two, and takes one or the other
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={found[1]}", file.name, "-o", os.devnull]
        return "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _amd(compiled: Any) -> tuple[int, int]:
    found = {
        key: int(number)
        for key, number in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]
        )
    }
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
