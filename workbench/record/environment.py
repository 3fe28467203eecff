"""What a result may depend on besides its recipe: versions, hardware, source."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workbench.record.git import GitState


def environment(*, seed: int, text_fingerprint: str, hardware: Mapping[str, Any], git: GitState) -> dict[str, Any]:
    """A JSON-able account of this process and machine.

    `hardware` is the caller's (thread count, GPU, ...) and is kept beside what is found here. No environment variable,
    no command line, no user name and no remote address is recorded: any of them may be secret.
    """
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": platform.platform(),
        "packages": dict(_packages()),
        "hardware": {
            "cpu_model": _cpu_model(),
            "cpu_cores": os.cpu_count(),
            "cpu_cores_usable": _usable_cores(),
            "memory_bytes": _memory_bytes(),
            **hardware,
        },
        "git": {"commit": git.commit, "note": git.note, "diff_bytes": len(git.diff)},
        "seed": seed,
        "text_fingerprint": text_fingerprint,
    }


@cache
def _packages() -> tuple[tuple[str, str], ...]:
    """Name and version of every installed distribution."""
    found = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return tuple(sorted((name, version) for name, version in found.items() if name))


def _cpu_model() -> str:
    description = Path("/proc/cpuinfo")
    if description.is_file():
        for line in description.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell (Windows)."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
