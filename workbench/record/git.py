"""The state of the source that runs: commit and uncommitted changes."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

MAX_DIFF_BYTES = 1_000_000
_TIMEOUT_S = 20


@dataclass(frozen=True)
class GitState:
    """`commit` is None when `note` says why there is none. `diff` is that of tracked files against the commit."""

    commit: str | None
    note: str
    diff: bytes = b""


def git_state(source: Path, max_diff_bytes: int = MAX_DIFF_BYTES) -> GitState:
    """Commit and diff of the checkout that tracks the file `source`.

    Untracked files are left out: they may be large or secret. A diff beyond `max_diff_bytes` is cut there and `note`
    says so.
    A file that lies in a checkout without being tracked (an installed package in a project's `.venv`) has no commit.
    """
    try:
        if _git(source.parent, "ls-files", "--error-unmatch", "--", source.name) is None:
            return GitState(None, "the source is not in a git checkout")
        commit = _git(source.parent, "rev-parse", "--verify", "HEAD")
        if commit is None:
            return GitState(None, "the git checkout has no commit yet")
        diff = _diff(source.parent, max_diff_bytes)
    except FileNotFoundError:
        return GitState(None, "git is not installed")
    except subprocess.TimeoutExpired:
        return GitState(None, f"git did not answer within {_TIMEOUT_S} s")
    note = ""
    if diff is None:
        note = "git diff failed"
    elif len(diff) > max_diff_bytes:
        note = f"git.diff is cut at {max_diff_bytes} bytes"
    return GitState(commit.decode("ascii").strip(), note, (diff or b"")[:max_diff_bytes])


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints; None when it fails."""
    done = subprocess.run(
        _command(folder, *arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S
    )
    return done.stdout if done.returncode == 0 else None


def _diff(folder: Path, max_bytes: int) -> bytes | None:
    """The diff of the whole checkout, read no further than one byte beyond the cap; None when git fails."""
    command = _command(folder, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--", ":/")
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nowhere, stdout=subprocess.PIPE, stderr=nowhere) as process:
        assert process.stdout is not None
        diff = process.stdout.read(max_bytes + 1)
        if len(diff) > max_bytes:
            process.kill()
            return diff
    return diff if process.returncode == 0 else None


def _command(folder: Path, *arguments: str) -> list[str]:
    return ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(folder), *arguments]
