"""What is recorded about the machine and the source, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.record.environment import environment
from workbench.record.git import GitState, git_state
from workbench.record.process import Process, this_process


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit; the file handed back is tracked, in a sub-folder."""
    source = tmp_path / "package" / "source.py"
    source.parent.mkdir()
    source.write_text("one\n")
    (tmp_path / "beside.py").write_text("one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return source


def test_commit_and_diff_of_the_whole_checkout(checkout: Path) -> None:
    clean = git_state(checkout)
    assert clean.commit is not None and len(clean.commit) == 40
    assert (clean.diff, clean.note) == (b"", "")
    checkout.with_name("untracked.py").write_text("SECRET\n")
    (checkout.parent.parent / "beside.py").write_text("two\n")
    changed = git_state(checkout)
    assert changed.commit == clean.commit
    assert b"-one\n+two\n" in changed.diff
    assert b"SECRET" not in changed.diff


def test_the_diff_is_capped_and_says_so(checkout: Path) -> None:
    checkout.write_text("x" * 5000 + "\n")
    state = git_state(checkout, max_diff_bytes=1000)
    assert len(state.diff) == 1000
    assert state.note == "git.diff is cut at 1000 bytes"


def test_no_checkout_no_commit_no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout.with_name("installed.py")
    installed.write_text("")
    assert git_state(installed) == GitState(None, "the source is not in a git checkout")
    fresh = checkout.parent / "fresh" / "source.py"
    fresh.parent.mkdir()
    fresh.write_text("")
    git(fresh.parent, "init", "-q")
    git(fresh.parent, "add", ".")
    assert git_state(fresh) == GitState(None, "the git checkout has no commit yet")
    monkeypatch.setenv("PATH", str(checkout.parent))
    assert git_state(checkout) == GitState(None, "git is not installed")


def test_environment_has_versions_and_hardware_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2-very-secret")
    monkeypatch.setattr(sys, "argv", ["x", "--password=hunter2-very-secret"])
    account = environment(seed=3, text_fingerprint="abc", hardware={"threads": 2}, git=GitState("c0ffee", ""))
    assert "hunter2" not in json.dumps(account)
    assert account["packages"]["numpy"] == __import__("numpy").__version__
    assert account["hardware"]["threads"] == 2
    assert account["hardware"]["cpu_cores"] == os.cpu_count()
    assert account["hardware"]["cpu_model"]
    assert account["hardware"]["memory_bytes"] is None or account["hardware"]["memory_bytes"] > 2**27
    assert (account["seed"], account["text_fingerprint"], account["git"]["commit"]) == (3, "abc", "c0ffee")


def test_a_process_is_known_by_more_than_its_id() -> None:
    me = this_process()
    assert me.is_alive()
    if sys.platform.startswith("linux"):
        assert not Process(me.host, me.pid, "another-boot:17").is_alive()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = Process(me.host, child.pid, "")
    if sys.platform.startswith("linux"):
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity = Process(me.host, child.pid, f"{boot}:{fields[19]}")
    assert identity.is_alive()
    child.kill()
    # WNOWAIT: dead, and its zombie is still there.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if sys.platform.startswith("linux"):
        assert not identity.is_alive()
    child.communicate()
    assert not identity.is_alive()
    assert Process("another-host", 1, "x").is_alive()
