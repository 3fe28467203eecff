"""The command `workbench`."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from workbench.live import Run
    from workbench.record import Snapshot
    from workbench.train.recipes import Recipe

# Rooms are imported inside the commands: `workbench --help` must not wait for torch.


class _OneLineErrors(TyperGroup):
    """What the user got wrong is said in one line on stderr, with exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except (typer.TyperException, ValueError, OSError) as error:
            told = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            _complain(told)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


class _PairedParameters(TyperCommand):
    """`-p NAME VALUE`, any number of times: typer itself knows no repeated option of two words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        words = iter(args)
        for word in words:
            joined.append(word)
            if word in ("-p", "--parameter"):
                pair = [next(words, None), next(words, None)]
                if pair[1] is None:
                    raise ValueError(f"{word} takes a name and a value")
                joined.append(f"{pair[0]}={pair[1]}")
        return super().parse_args(ctx, joined)


def _complain(message: str) -> None:
    typer.echo(f"workbench: {' '.join(message.split())}", err=True)


app = typer.Typer(
    cls=_OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
)
runs_app = typer.Typer(rich_markup_mode=None)
app.add_typer(runs_app, name="runs")


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Train small mixture-of-experts language models and watch every part of them at work.

    Example: workbench lab
    """
    # Idle threads of torch's pool then soon sleep and leave the cores to a browser or another run (the Makefile has the
    # numbers); kernels inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def lab(
    notebook: Annotated[Path | None, typer.Argument(help="The notebook to open; the tour by default.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Options of JupyterLab, after `--`.")] = None,
) -> None:
    """Open JupyterLab.

    Example: workbench lab notebooks/00_tour.ipynb -- --port 9000 --no-browser
    """
    opened = notebook or _tour()
    if not opened.is_file():
        raise ValueError(f"there is no notebook {opened}")
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(opened), *(options or [])])


@app.command(cls=_PairedParameters)
def run(
    notebook: Annotated[str, typer.Argument(help="The notebook to run.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Where the executed notebook goes (.ipynb).")],
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME VALUE", help="A parameter and its value; repeatable."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write a self-contained HTML report beside it.")
    ] = False,
) -> None:
    """Run a notebook from top to bottom, with parameters in place of its own.

    Example: workbench run notebooks/00_tour.ipynb -p fast true -p seed 3 -o out/tour.ipynb --report
    """
    from workbench import headless

    known = headless.parameters(notebook)
    pairs = [pair.split("=", 1) for pair in parameter or []]
    given = {name: _value(name, text, known.get(name)) for name, text in pairs}
    _run(notebook, out, given, report=report)


@app.command()
def tour(
    folder: Annotated[Path, typer.Option("-o", "--out", help="The folder for everything it leaves.")] = Path(
        "out/tour"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Train a few steps only.")] = False,
) -> None:
    """Run the tour without a screen; the last line is the path of its report.

    Example: workbench tour --fast
    """
    notebook = _tour()
    given = {"fast": fast, "live": False, "out_dir": str(folder / "runs")}
    typer.echo("running the tour" + ("" if fast else "; this takes some minutes"), err=True)
    _run(notebook, folder / "00_tour.ipynb", given, report=True)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A function of workbench.train.recipes, such as toy_v3.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The new run folder; runs/RECIPE-001 and on by default.")] = None,
    steps: Annotated[int | None, typer.Option("-s", "--steps", help="Updates, in place of the recipe's.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="Go on with this run, in place of a recipe.")
    ] = None,
) -> None:
    """Train a recipe, or go on with a run, and print one line per evaluation. Ctrl-C stops it with a checkpoint.

    Example: workbench train toy_v3 --folder runs/first -s 200
    """
    match recipe, resume:
        case str(), None:
            training, target = _start(recipe, folder, steps)
        case None, Path() if folder is None:
            training, target = _resume(resume, steps), resume
        case _:
            raise ValueError("train takes either a recipe, with or without --folder, or --resume FOLDER")
    try:
        ended = _follow(training)
    except KeyboardInterrupt:
        typer.echo("stopping")
        training.halt("interrupted")
        ended = training.snapshot()
    if ended.status == "failed":
        _complain(f"the run failed: {ended.message}")
        raise typer.Exit(1)
    training.wait()
    typer.echo(f"{ended.status} at step {ended.step} of {ended.total_steps}: {target}")


@app.command()
def doctor() -> None:
    """Show what this machine has, and what each missing thing costs.

    Example: workbench doctor
    """
    from workbench.doctor import examine

    found = examine()
    typer.echo(found.table())
    if not found.ready:
        raise typer.Exit(1)


@app.command()
def normalize(
    paths: Annotated[list[Path], typer.Argument(help="Notebooks, or folders of them.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if a notebook would change.")] = False,
) -> None:
    """Bring notebooks into the form in which they are stored: no timings, images, widget state, paths.

    Example: workbench normalize --check notebooks
    """
    from workbench import headless

    bad = 0
    for path in _notebooks(paths):
        text = headless.normalized_text(path)
        changed = text != path.read_text(encoding="utf-8")
        if changed and not check:
            path.write_text(text, encoding="utf-8")
            typer.echo(f"normalized {path}")
        faults = headless.complaints(headless.read(path))
        if changed and check:
            faults.insert(0, "is not normalized: workbench normalize " + str(path))
        for fault in faults:
            typer.echo(f"{path}: {fault}", err=True)
        bad += bool(faults)
    if bad:
        raise typer.Exit(1)


_Root = Annotated[Path, typer.Option("--root", help="The folder that holds the run folders.")]
_RUNS = Path("runs")


@runs_app.callback(invoke_without_command=True)
def runs(context: typer.Context, root: _Root = _RUNS) -> None:
    """List, rename and delete recorded runs.

    Example: workbench runs rename toy_v3-001 baseline
    """
    if context.invoked_subcommand is None:
        list_runs(root)
    elif root != _RUNS:
        raise ValueError(f"--root belongs behind {context.invoked_subcommand}")


@runs_app.command("list")
def list_runs(root: _Root = _RUNS) -> None:
    """Name, status, progress and size of every run.

    Example: workbench runs list --root runs
    """
    from rich.console import Console
    from rich.table import Table

    from workbench import record

    found_runs = record.runs(root)
    if not found_runs:
        typer.echo(f"no runs in {root}; --root names another folder")
        return
    table = Table("run", "status", "step", "disk", "started", box=None)
    for found in found_runs:
        size = f"{found.disk_bytes / 2**20:.1f} MiB"
        started = found.started.astimezone().strftime("%Y-%m-%d %H:%M") if found.started else ""
        table.add_row(found.name, found.status, f"{found.step}/{found.total_steps}", size, started)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@runs_app.command()
def rename(old: str, new: str, root: _Root = _RUNS) -> None:
    """Give a run another name.

    Example: workbench runs rename toy_v3-001 baseline
    """
    from workbench import record

    record.rename(root, old, new)


@runs_app.command()
def delete(name: str, root: _Root = _RUNS) -> None:
    """Delete a run for good; a running one is refused.

    Example: workbench runs delete toy_v3-001
    """
    from workbench import record

    record.delete(root, name)


def _run(notebook: Path | str, out: Path | str, given: dict[str, Any], *, report: bool) -> None:
    from workbench import headless

    try:
        executed = headless.run(notebook, out, given)
    except headless.NotebookFailed as failure:
        _complain(str(failure))
        raise typer.Exit(1) from None
    typer.echo(headless.report(executed, executed.with_suffix(".html")) if report else executed)


def _tour() -> Path:
    path = Path(__file__).parents[1] / "notebooks" / "00_tour.ipynb"
    if not path.is_file():
        raise ValueError(f"there is no {path}: the notebooks come with the source checkout, not with the package")
    return path


def _value(name: str, text: str, default: Any) -> Any:
    """What `text` from the command line means for a parameter with this default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if default is None:
            return text
        raise ValueError(f"{name}={text!r} must be of type {type(default).__name__}") from None


def _start(recipe: str, folder: Path | None, steps: int | None) -> tuple[Run, Path]:
    chosen = _recipe(recipe)
    if steps is not None:
        chosen = replace(chosen, steps=steps)

    from workbench import live, record

    target = folder or record.fresh_folder(Path("runs"), chosen.name)
    training = live.start(chosen, target)
    typer.echo(f"{chosen.name}: {chosen.steps} steps into {target}")
    return training, target


def _resume(folder: Path, steps: int | None) -> Run:
    from workbench import live

    training = live.resume(folder, steps=steps)
    began = training.began_with
    typer.echo(f"{folder}: from step {began.step} of {began.total_steps}")
    return training


def _recipe(name: str) -> Recipe:
    from workbench.train import recipes

    known = {
        key: function
        for key, function in inspect.getmembers(recipes, inspect.isfunction)
        if function.__annotations__.get("return") == "Recipe" and not inspect.signature(function).parameters
    }
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]()


def _notebooks(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
        else:
            found.append(path)
    return found


def _follow(training: Run) -> Snapshot:
    """Print every new evaluation as it comes; returns when the run has ended."""
    told = len(training.began_with.evaluations)
    while True:
        now = training.wait_for(lambda snapshot, told=told: snapshot.ended or len(snapshot.evaluations) > told)
        for evaluation in now.evaluations[told:]:
            typer.echo(
                f"step {evaluation.step:>6} of {now.total_steps}   validation {evaluation.nats_per_byte:.3f} nats/byte"
                f"   (bigram {evaluation.floors_nats_per_byte['bigram']:.3f})"
            )
        told = len(now.evaluations)
        if now.ended:
            return now
