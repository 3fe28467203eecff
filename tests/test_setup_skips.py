"""`--fail-on-skip`, which .ci/run sets: a skip is a failure unless it wants a GPU, and so is having no test at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PASSES = "def test_passes(): pass\n"
SKIPS = {
    "test_by_call.py": "import pytest\ndef test_it(): pytest.skip('no browser')\n",
    "test_by_mark.py": "import pytest\n@pytest.mark.skipif(True, reason='why not')\ndef test_it(): pass\n",
    "test_by_module.py": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n",
}
SKIPS_FOR_GPU = "import pytest\n@pytest.mark.gpu\ndef test_it(): pytest.skip('no GPU')\n"


ALONE: tuple[str, ...] = ()
BY_WORKERS = ("-p", "xdist", "-n", "2", "--dist", "loadfile")  # as `make test` does


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("way", [ALONE, BY_WORKERS], ids=["alone", "by workers"])
def test_every_kind_of_skip_fails_and_is_named(tmp_path: Path, way: tuple[str, ...]):
    for name, source in {**SKIPS, "test_passes.py": PASSES, "test_gpu.py": SKIPS_FOR_GPU}.items():
        (tmp_path / name).write_text(source)
    done = run(tmp_path, "--fail-on-skip", *way)
    assert done.returncode == 1
    told = done.stdout.split("that is a failure here")[1]
    assert [name for name in [*SKIPS, "test_passes.py", "test_gpu.py"] if name in told] == list(SKIPS)
    assert run(tmp_path, *way).returncode == 0


@pytest.mark.parametrize("way", [ALONE, BY_WORKERS], ids=["alone", "by workers"])
def test_a_gpu_skip_is_excused(tmp_path: Path, way: tuple[str, ...]):
    (tmp_path / "test_it.py").write_text(PASSES + SKIPS_FOR_GPU)
    assert run(tmp_path, "--fail-on-skip", *way).returncode == 0


def test_no_tests_fail(tmp_path: Path):
    assert run(tmp_path, "--fail-on-skip").returncode != 0
