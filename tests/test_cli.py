"""The command `workbench`: what it does, and one line on stderr with exit code 2 for whatever was mistyped."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from tiny import tiny_recipe
from typer.testing import CliRunner, Result

from workbench.cli import app
from workbench.train import recipes
from workbench.train.optimizer import AdamW
from workbench.train.recipes import Recipe

COMMANDS = ["lab", "run", "tour", "train", "doctor", "normalize", "runs", "runs list", "runs rename", "runs delete"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def notebook(path: Path, *sources: str) -> Path:
    first = new_code_cell("steps = 3\nname = 'a'\nfast = False", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[first, *map(new_code_cell, sources)]), path)
    return path


@pytest.fixture
def give_recipe(monkeypatch: pytest.MonkeyPatch):
    """Makes the tiny recipe, changed as asked, one of the recipes that the command knows."""

    def give(**changes: object) -> None:
        def tiny() -> Recipe:
            return tiny_recipe(**changes)

        tiny.__annotations__["return"] = "Recipe"  # as written in a file with postponed annotations
        monkeypatch.setattr(recipes, "tiny", tiny, raising=False)

    return give


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: workbench {command.split()[0]}" in result.output


def test_every_command_is_tested_for_its_help():
    listed = call("--help").output.split("Commands:")[1]
    assert {command.split()[0] for command in COMMANDS} == {line.split()[0] for line in listed.splitlines() if line}


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom workbench.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_arguments_it_shows_its_help():
    result = call()
    assert result.exit_code == 0 and "Commands:" in result.output


def test_doctor_shows_the_table():
    result = call("doctor")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "workbench: ready (everything here runs, with or without a GPU)"


def test_run_takes_typed_parameters_and_writes_a_report(tmp_path: Path):
    source = notebook(tmp_path / "a.ipynb", "print(repr(steps), repr(name), repr(fast))")
    out = tmp_path / "out" / "b.ipynb"
    said = ["-p", "steps", "7", "-p", "name", "8=9", "--parameter", "fast", "true"]
    result = call("run", str(source), *said, "-o", str(out), "--report")
    assert result.exit_code == 0, result.output
    report = Path(result.stdout.strip())
    assert report == out.with_suffix(".html") and "7 &#39;8=9&#39; True" in report.read_text().replace("'", "&#39;")


def test_run_says_in_one_line_which_cell_failed(tmp_path: Path):
    source = notebook(tmp_path / "a.ipynb", "1/0")
    result = call("run", str(source), "-o", str(tmp_path / "b.ipynb"))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("workbench: a.ipynb, cell 2: ZeroDivisionError: division by zero; ")


def test_normalize_mends_and_checks(tmp_path: Path):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1", execution_count=4)]), path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.ipynb").write_text("ignored")
    before = path.read_text()

    result = call("normalize", "--check", str(tmp_path))
    assert result.exit_code == 1 and "is not normalized" in result.stderr
    assert path.read_text() == before
    assert call("normalize", str(tmp_path)).exit_code == 0
    assert call("normalize", "--check", str(tmp_path)).exit_code == 0
    assert path.read_text() != before


def test_train_and_then_list_rename_delete(tmp_path: Path, give_recipe: Callable[..., None]):
    give_recipe()
    root = tmp_path / "runs"
    result = call("train", "tiny", "--folder", str(root / "first"), "-s", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"tiny: 3 steps into {root / 'first'}"
    assert re.match(r"step +0 of 3 +validation \d\.\d{3} nats/byte +\(bigram \d\.\d{3}\)$", lines[1])
    assert lines[2].startswith("step      3 of 3 ")
    assert lines[-1] == f"finished at step 3 of 3: {root / 'first'}"

    at = ("--root", str(root))
    assert call("runs", "rename", "first", "second", *at).exit_code == 0
    listed = call("runs", "list", *at).stdout.split()
    assert call("runs", *at).stdout.split() == listed
    assert "second" in listed and "first" not in listed and "finished" in listed and "3/3" in listed
    again = call("train", "tiny", "--folder", str(root / "second"))
    assert again.exit_code == 2 and len(again.stderr.splitlines()) == 1
    assert call("runs", "delete", "second", *at).exit_code == 0
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("command", [["runs"], ["runs", "list"]], ids=" ".join)
def test_no_runs_is_one_line_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]):
    monkeypatch.chdir(tmp_path)
    for folder, options in (("runs", []), (str(tmp_path), ["--root", str(tmp_path)])):
        result = call(*command, *options)
        assert result.exit_code == 0 and result.stderr == ""
        assert result.stdout == f"no runs in {folder}; --root names another folder\n"


def test_a_stopped_run_goes_on_and_prints_its_new_evaluations(tmp_path: Path, give_recipe: Callable[..., None]):
    give_recipe()
    folder = str(tmp_path / "first")
    assert call("train", "tiny", "--folder", folder, "-s", "3").exit_code == 0
    done = call("train", "--resume", folder)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "first has made 3 of 3 steps" in done.stderr
    result = call("train", "--resume", folder, "-s", "9")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: from step 3 of 9"
    assert [line.split(" of ")[0].split() for line in lines[1:-1]] == [["step", "6"], ["step", "9"]]
    assert lines[-1] == f"finished at step 9 of 9: {folder}"


def test_a_failed_run_is_one_line(tmp_path: Path, give_recipe: Callable[..., None]):
    give_recipe(optimizer=AdamW(learning_rate=1e30))
    result = call("train", "tiny", "--folder", str(tmp_path / "first"))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("workbench: the run failed: ") and "the update was not made" in line


def test_an_interrupt_stops_training_with_a_checkpoint(tmp_path: Path):
    code = f"""
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import tiny_recipe
from workbench.cli import app
from workbench.train import recipes
def tiny(): return tiny_recipe(steps=1_000_000)
tiny.__annotations__["return"] = "Recipe"
recipes.tiny = tiny
app(["train", "tiny", "--folder", "first"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None
        for line in training.stdout:
            if line.startswith("step      3 "):
                training.send_signal(signal.SIGINT)
                break
        said, complained = training.communicate(timeout=120)
    assert training.returncode == 0 and complained == ""
    assert said.splitlines()[-1].startswith("stopped at step ")
    assert list((tmp_path / "first" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["run"], "Missing argument 'notebook'."),
        (["run", "a.ipynb"], "Missing option '-o' / '--out'."),
        (["run", "a.ipynb", "-o", "b.ipynb", "--nonsense"], "No such option: --nonsense"),
        (["run", "a.ipynb", "-o", "b.ipynb", "-p", "x"], "-p takes a name and a value"),
        (["run", "absent.ipynb", "-o", "b.ipynb"], "there is no notebook absent.ipynb"),
        (["run", "a.ipynb", "-o", "b.html"], "out='b.html' must end in .ipynb"),
        (
            ["run", "a.ipynb", "-o", "b.ipynb", "-p", "stepz", "3"],
            "has no parameter 'stepz'; it has: fast, name, steps",
        ),
        (["run", "a.ipynb", "-o", "b.ipynb", "-p", "steps", "many"], "steps='many' must be of type int"),
        (["run", "a.ipynb", "-o", "b.ipynb", "-p", "steps", "{[]:1}"], "steps='{[]:1}' must be of type int"),
        (["run", "a.ipynb", "-o", "b.ipynb", "-p", "steps", "-" * 5000 + "1"], "must be of type int"),
        (["run", "a.ipynb", "-o", "b.ipynb", "-p", "fast", "1"], "fast=1 must be of type bool"),
        (["run", "http://x/a.ipynb", "-o", "b.ipynb"], "must be a local path"),
        (["run", "a.ipynb", "-o", "s3://x/b.ipynb"], "must be a local path"),
        (["lab", "absent.ipynb"], "there is no notebook absent.ipynb"),
        (["train", "toy_v4"], "there is no recipe 'toy_v4'; there are: "),
        (["train", "toy_v3", "-s", "0"], "steps=0"),
        (["train"], "train takes either a recipe"),
        (["train", "toy_v3", "--resume", "a"], "train takes either a recipe"),
        (["train", "--folder", "b", "--resume", "a"], "train takes either a recipe"),
        (["train", "--resume", "absent"], "is not a run folder"),
        (["train", "toy_v3", "-s", "x"], "Invalid value for '-s' / '--steps'"),
        (["normalize", "absent.ipynb"], "there is no notebook absent.ipynb"),
        (["runs", "rename", "absent", "b"], "absent"),
        (["runs", "delete", "../x"], "../x"),
        (["runs", "--root", "a", "delete", "b"], "--root belongs behind delete"),
        (["runs", "nonsense"], "No such command 'nonsense'."),
    ],
    ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
):
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path / "a.ipynb")
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("workbench: ") and said in line


def test_the_installed_command_behaves_the_same(tmp_path: Path):
    command = [str(Path(sys.executable).with_name("workbench")), "run", "absent.ipynb", "-o", "b.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "workbench: there is no notebook absent.ipynb\n"
