"""What is installed: the wheel, outside the checkout, and the versions that constraints.txt pins."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (path,) = folder.glob("moe_workbench-*.whl")
    return path


def test_the_wheel_holds_two_packages_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"workbench", "workbench_kernels"}
    assert {"workbench/py.typed", "workbench/headless/template/index.html.j2"} <= set(names)
    models = {f"workbench/data/models/{path.name}" for path in (ROOT / "data" / "models").iterdir()}
    assert {name for name in names if name.startswith("workbench/data/")} == {*models, "workbench/data/published.csv"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import importlib.util
import workbench, workbench.doctor, workbench.model.config
assert workbench.__version__
print(workbench.__file__)
print(importlib.util.find_spec("workbench_kernels").origin)
assert importlib.util.find_spec("kernels") is None
assert workbench.config("deepseek-v3").num_nextn_predict_layers == 1
from workbench.model.published import data_folder
print(data_folder() / "published.csv")
assert (data_folder() / "published.csv").is_file()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.startswith(str(site)) for line in done.stdout.splitlines()] == [True, True, True]


def test_published_configurations_open_in_the_checkout_too(tmp_path: Path):
    code = "import workbench; print(workbench.__file__, len(workbench.config('deepseek-v3').layers))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "61"


def test_an_editable_install_shows_the_packages_and_nothing_else(tmp_path: Path):
    """A folder of its own beside them, of data say, would hide the package that the installation points to."""
    code = """
import sys
from hatchling.builders.wheel import WheelBuilder
print(*WheelBuilder(sys.argv[1]).build(versions=["editable"], directory=sys.argv[2]))
"""
    build = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(done.stdout.strip()).namelist()
    assert not [name for name in names if name.startswith(("workbench/", "workbench_kernels/", "data/", "kernels/"))]


def needed(distribution: str, extras: set[str], seen: dict[str, set[str]]) -> None:
    """Every distribution that `distribution` with `extras` brings along on this machine, into `seen`.

    One that is not installed (whoever works without pyright's Node.js, say) is named but not followed further.
    """
    if extras <= seen.get(distribution, set()) and distribution in seen:
        return
    seen[distribution] = seen.get(distribution, set()) | extras
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        needed(re.sub(r"[-_.]+", "-", requirement.name).lower(), set(requirement.extras), seen)


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_version_is_pinned_exactly_once():
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins())
    names = [re.sub(r"[-_.]+", "-", pin.name).lower() for pin in pins()]
    assert len(names) == len(set(names))

    seen: dict[str, set[str]] = {}
    needed("moe-workbench", {"test", "dev"}, seen)
    # A CUDA build of torch brings libraries in versions of its own.
    brought = {name for name in seen if name.startswith(("nvidia-", "cuda-"))}
    assert set(seen) - set(names) - {"moe-workbench"} == brought
    assert {"hatchling", "editables"} <= set(names)


def test_torch_is_pinned_without_a_build_and_triton_for_linux():
    stated = {pin.name: pin for pin in pins()}
    assert str(stated["torch"].specifier) == "==2.13.0"
    assert str(stated["triton"]) == 'triton==3.7.1; platform_system == "Linux"'


def test_every_pin_satisfies_what_the_project_asks_for():
    stated = {re.sub(r"[-_.]+", "-", pin.name).lower(): str(pin.specifier).removeprefix("==") for pin in pins()}
    for line in metadata.requires("moe-workbench") or []:
        requirement = Requirement(line)
        assert requirement.specifier.contains(stated[re.sub(r"[-_.]+", "-", requirement.name).lower()]), line
