"""The Makefile and .ci/run say what the README says; setting up itself is proved by the machine that runs this."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A Python that is not new enough, as far as its answer to the version question goes."""
    path = tmp_path / "old-python"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def test_help_is_the_default_and_names_every_target(checkout: Path):
    done = make(checkout)
    assert done.returncode == 0
    for target in ("setup", "lab", "tour", "test", "check", "bench", "clean"):
        assert f"make {target}" in done.stdout


@pytest.mark.parametrize("target", ["setup", "lab", "tour", "test", "check", "bench"])
def test_every_target_sets_up_a_fresh_checkout(checkout: Path, target: str):
    plan = make(checkout, "--dry-run", target).stdout
    assert "-m venv" in plan
    assert "pip install -c constraints.txt" in plan


def test_a_set_up_checkout_is_left_alone_until_its_sources_change(checkout: Path):
    (checkout / ".venv").mkdir()
    ready = checkout / ".venv" / ".ready"
    ready.touch()
    later = max((checkout / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")) + 10
    os.utime(ready, (later, later))
    assert "pip install" not in make(checkout, "--dry-run", "test").stdout
    for changed in ("pyproject.toml", "constraints.txt"):
        os.utime(checkout / changed, (later + 10, later + 10))
        assert "pip install" in make(checkout, "--dry-run", "test").stdout
        os.utime(checkout / changed, (later - 10, later - 10))


def test_another_torch_build_is_taken_from_its_index_alone(checkout: Path):
    plan = make(checkout, "--dry-run", "setup", "TORCH_INDEX=https://example.org/cpu").stdout
    (line,) = (line for line in plan.splitlines() if "https://example.org/cpu" in line)
    assert line.endswith("--no-deps torch") and "-c constraints.txt" in line


def test_bench_runs_every_benchmark(checkout: Path):
    folder = checkout / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "count.py").touch()
    plan = make(checkout, "--dry-run", "bench").stdout
    assert "kernels/bench/run.py" in plan and "tests/benchmarks/count.py" in plan


def test_an_old_python_is_one_clear_line(checkout: Path, old_python: Path):
    done = make(checkout, "-s", "setup", f"PYTHON={old_python}")
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert ours == ["Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"]
    assert not (checkout / ".venv").exists()


def test_clean_leaves_runs_and_environment(checkout: Path):
    kept = [checkout / name for name in ("runs/a/run.sqlite", "out/tour/00_tour.html", ".venv/bin/python")]
    dropped = [checkout / name for name in (".ruff_cache/x", "workbench/__pycache__/x.pyc")]
    for path in [*kept, *dropped]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for folder in ("kernels", "notebooks", "tests"):
        (checkout / folder).mkdir()
    assert make(checkout, "clean").returncode == 0
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in dropped)


def test_ci_checks_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert "set -euo pipefail" in script
    assert "\nmake check\n" in script and script.endswith(" make test\n") and "--fail-on-skip" in script
