"""Which process wrote something, and whether it still lives."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process of this or another machine.

    `started` tells a process from a later one with the same id: on Linux the boot id and the start time in clock
    ticks. Elsewhere it is empty, and an id that the system has given to another process is taken for the old one:
    a dead writer may then be held for a living one, never the other way round.
    """

    host: str
    pid: int
    started: str

    def is_here(self) -> bool:
        """Whether the process is, or was, of this machine, so that `is_alive` can be asked."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether the process still runs. Of another machine nothing is known; it counts as alive."""
        if not self.is_here():
            return True
        if sys.platform.startswith("linux"):
            return self.started != "" and _linux_start(self.pid) == self.started
        if sys.platform == "win32":
            return _windows_is_alive(self.pid)
        return _posix_is_alive(self.pid)


def this_process() -> Process:
    """The process that calls."""
    started = _linux_start(os.getpid()) if sys.platform.startswith("linux") else ""
    return Process(socket.gethostname(), os.getpid(), started)


def _linux_start(pid: int) -> str:
    """Boot id and start ticks of a process; empty when there is none or only its zombie is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The command in field 2 may itself hold spaces and brackets: count from the last closing one.
    fields = stat[stat.rindex(")") + 1 :].split()
    state, start_ticks = fields[0], fields[19]
    if state in "ZX":
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{start_ticks}"


def _posix_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _windows_is_alive(pid: int) -> bool:
    # os.kill(pid, 0) would send a Ctrl-C event here.
    query_limited_information, still_active = 0x1000, 259
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (the name exists on Windows only)
    handle = kernel.OpenProcess(query_limited_information, False, pid)
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == still_active
