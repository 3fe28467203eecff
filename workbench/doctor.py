"""What this machine has and lacks, and what each missing thing costs.

`workbench.doctor()` gives a report whose display is one verdict line, the same on every machine that can run the
notebooks; `print(workbench.doctor().table())`, or the command `workbench doctor`, shows everything that was found.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_GIB = 2**30

# One JSON line per finding, printed as soon as it is known: what a crash or a hang leaves unsaid counts as missing.
_PROBE = """
import json

def found(name, text):
    print(json.dumps([name, text]), flush=True)

import torch
found("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}, sm_{gpu.major}{gpu.minor}"
    count = torch.cuda.device_count()
    found("GPU", f"{count} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {kind}")
import triton
found("Triton", triton.__version__)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for: `found` is None where it is missing, and `cost` says what that means."""

    name: str
    found: str | None
    cost: str
    required: bool = False


@dataclass(frozen=True, repr=False)
class Report:
    """All findings; its display is the verdict alone, so that a stored notebook output holds on every machine."""

    findings: tuple[Finding, ...]

    @property
    def missing(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.found is None)

    @property
    def ready(self) -> bool:
        return not any(finding.required for finding in self.missing)

    def __repr__(self) -> str:
        if self.ready:
            return "workbench: ready (everything here runs, with or without a GPU)"
        lacking = "; ".join(
            f"{finding.name} is missing: {finding.cost}" for finding in self.missing if finding.required
        )
        return f"workbench: not ready ({lacking})"

    def table(self) -> str:
        """Every finding on a line of its own, then the verdict."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [
            f"{finding.name:<{width}}  {finding.found if finding.found is not None else f'missing: {finding.cost}'}"
            for finding in self.findings
        ]
        return "\n".join([*lines, "", repr(self)])


def examine(timeout_s: float = 120.0) -> Report:
    """Look at this machine. torch and Triton are tried in a process of their own, which may crash or hang."""
    probed = _probe(timeout_s)
    return Report(
        (
            Finding("workbench", _version("moe-workbench"), "install the checkout: `make setup`", required=True),
            Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", ""),
            Finding("torch", probed.get("torch"), "nothing can be trained; run `make setup`", required=True),
            Finding("JupyterLab", _version("jupyterlab"), "notebooks cannot be opened; run `make setup`"),
            Finding("cores", str(_cores()), ""),
            Finding("memory", _memory(), "it could not be read; `toy_v3` needs about 2 GiB"),
            Finding("free disk", f"{shutil.disk_usage(Path.cwd()).free / _GIB:.0f} GiB here", ""),
            Finding("bfloat16", _bfloat16(), "no such instructions are known here; train in float32"),
            Finding("GPU", probed.get("GPU"), "nothing here needs one; larger recipes take longer"),
            Finding("Triton", probed.get("Triton"), "the `fused` tier of the kernels; all else works"),
            Finding("browser", _browser(), "the browser tests; install Chromium to run them"),
        )
    )


def _probe(timeout_s: float) -> dict[str, str]:
    try:
        # -P: a file torch.py in the working directory is not torch.
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        told = done.stdout
    except subprocess.TimeoutExpired as expired:
        told = expired.stdout or ""
        if isinstance(told, bytes):  # on POSIX, whatever text mode says
            told = told.decode()
    return dict(json.loads(line) for line in told.splitlines() if line.startswith("["))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / _GIB:.0f} GiB"


def _bfloat16() -> str | None:
    """The processor's bfloat16 instructions, by the names that Linux gives them."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return None
    present = set(flags.read_text().split())
    names = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in present]
    return ", ".join(names) or None


def _browser() -> str | None:
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


class _CallableModule(ModuleType):
    """`workbench.doctor` is this module and, called, its examination: one name whether it was imported or looked up.

    Setting a module's `__class__` is the documented way: https://docs.python.org/3/reference/datamodel.html
    """

    def __call__(self) -> Report:
        return examine()


sys.modules[__name__].__class__ = _CallableModule
