"""A line on the error stream that says how far a long piece of work has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def progress_bar(label: str, *, delay_s: float = 1.0) -> Callable[[int, int], None]:
    """A function of (bytes done, bytes in all) that redraws a line at every new percent.

    Nothing is drawn before `delay_s` have passed, so that quick work leaves no trace.
    """
    begun, drawn = time.monotonic(), -1

    def advance(done: int, total: int) -> None:
        nonlocal drawn
        percent = 100 * done // max(total, 1)
        if percent == drawn or time.monotonic() - begun < delay_s or (done == total and drawn < 0):
            return
        drawn = percent
        bar = "#" * (percent // 4)
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{label} [{bar:<25}] {done / 1e9:.2f} of {total / 1e9:.2f} GB{end}")
        sys.stderr.flush()

    return advance
