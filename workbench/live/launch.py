"""Starting and resuming runs: one trainer per process."""

from __future__ import annotations

import atexit
import hashlib
import json
import platform
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from workbench.live.run import Run
from workbench.model.decoder import Decoder
from workbench.record import LIVE_STATES, Controls, RunWriter, Snapshot, Tail, checkpoint, validate_name
from workbench.record.database import connect, read_meta
from workbench.text import Text, load
from workbench.train.events import Change
from workbench.train.loop import apply_change, refuse_other_vocabulary
from workbench.train.memory import refuse_missing_device, refuse_what_cannot_fit
from workbench.train.recipes import Recipe
from workbench.train.state import TrainState, refuse_other_shapes

# How long a process that ends waits for its run to finish a step and save.
_EXIT_SECONDS = 60.0

_lock = threading.RLock()
_runs: list[Run] = []


def start(
    recipe: Recipe,
    folder: str | Path,
    *,
    paused: bool = False,
    text: Text | None = None,
    weights_of: Decoder | None = None,
) -> Run:
    """Train `recipe` in the background and record it in the new `folder`; a run of this process is stopped before.

    Returns as soon as the text is loaded, which takes seconds once it is cached (`text`: none at all, if it was loaded
    before). Mistakes are so told here and not by a run that fails, nor is the earlier run stopped for them. With
    `paused` the run waits before it does anything. When the process ends, the run is stopped with a checkpoint.
    `weights_of` gives the initial weights, as `TrainState.from_decoder` takes them; their fingerprint is recorded.

    Raises:
        ValueError: the folder exists or its name is not allowed, the recipe's device is not there, its text cannot be
            read or has another vocabulary than the model, the given weights do not fit it, or it cannot fit into
            memory.
    """
    folder = Path(folder).absolute()
    validate_name(folder.parent, folder.name)
    refuse_missing_device(recipe.device)
    text = load(recipe.text, recipe.tokenizer) if text is None else text
    refuse_other_vocabulary(recipe, text)
    if weights_of is not None:
        refuse_other_shapes(recipe, weights_of)
    if recipe.num_threads is None:
        # Recorded as a number: the trainer's thread inherits what an earlier run chose, and results depend on it.
        recipe = replace(recipe, num_threads=torch.get_num_threads())
    recipe_json = recipe.to_json()
    with _lock:
        # The new run may need the memory of the earlier one, so only this is found out when that has ended.
        stop_running("another run was started")
        refuse_what_cannot_fit(recipe)
        state = None if weights_of is None else TrainState.from_decoder(recipe, weights_of)
        initial = None if weights_of is None else fingerprint(weights_of)
        experts = recipe.model.expert_layers()
        writer = RunWriter.create(
            folder,
            recipe_json=recipe_json,
            seed=recipe.seed,
            total_steps=recipe.steps,
            text_fingerprint=text.fingerprint,
            layer_names=[name for name, _ in experts],
            num_experts=max((layer.n_routed_experts for _, layer in experts), default=0),
            hardware={**hardware(recipe), "initial_weights": initial},
        )
        return hold(Run(writer, recipe, text, state, paused=paused))


def resume(
    folder: str | Path,
    *,
    step: int | None = None,
    change: Change | None = None,
    steps: int | None = None,
    paused: bool = False,
    text: Text | None = None,
    take_over: bool = False,
) -> Run:
    """Continue the run in `folder` from its newest checkpoint, exactly as if it had never stopped.

    What was recorded after that checkpoint is dropped and made again, without the controls that were given meanwhile;
    what was set at the checkpoint's own step acts again. `step` chooses an earlier checkpoint, such as the last intact
    one. `change` applies from the first step on. `steps` is a new total, which moves the rest of the schedule; it is
    recorded. `take_over` seizes the folder of a process on another machine, which must surely have ended.

    Raises:
        ValueError: not a run folder; it is being trained elsewhere; that checkpoint is not there or damaged; no step is
            left; its text reads differently from when it was started; the saved state does not fit the recipe; `change`
            sets what this run has not.
    """
    folder = Path(folder).absolute()
    with _lock:
        # The run of this process ends now if it is the one to resume: its last checkpoint is still to come. Another one
        # ends when everything is known to be well but the memory, which it may hold.
        stop_running("it was resumed", folder=folder)
        before = Tail(folder).snapshot()
        if before.status in LIVE_STATES and not take_over:
            raise ValueError(f"{folder.name} is {before.status}, written by another trainer; stop that first")
        recipe = Recipe.from_json((folder / "recipe.json").read_text())
        recipe = replace(recipe, steps=before.total_steps if steps is None else steps)
        refuse_missing_device(recipe.device)
        step, tensors, values = checkpoint.load(folder, step)
        if step >= recipe.steps:
            raise ValueError(f"{folder.name} has made {step} of {recipe.steps} steps; pass a larger `steps` to go on")
        text = load(recipe.text, recipe.tokenizer) if text is None else text
        refuse_other_text(folder, text)
        stop_running("another run was resumed")
        refuse_what_cannot_fit(recipe)
        state = TrainState.from_parts(recipe, tensors, values)
        # So that a change that is refused drops nothing; its control does the same once more and records it.
        apply_change(change, state)
        writer = RunWriter.reopen(
            folder, step, total_steps=recipe.steps, hardware=hardware(recipe), take_over=take_over
        )
        set_again(writer.history.snapshot(), state)
        if change is not None:
            Controls(folder).set(learning_rate=change.learning_rate, balance_speed=change.balance_speed)
        return hold(Run(writer, recipe, text, state, paused=paused))


def set_again(recorded: Snapshot, state: TrainState) -> None:
    """Apply what was set for the step after that of `state`: its checkpoint may be older than that."""
    for step, name, value in recorded.changes:
        if step == state.step + 1:
            apply_change(Change(**{name: value}), state)


def decoder(folder: str | Path, step: int | None = None, *, device: str = "cpu") -> Decoder:
    """The model of a run's newest checkpoint, or of that of `step`, in the weights' full precision, on `device`.

    Raises:
        ValueError: not a run folder, or no such checkpoint, or it is damaged.
    """
    folder = Path(folder)
    Tail(folder)
    recipe = replace(Recipe.from_json((folder / "recipe.json").read_text()), dtype="float32", device=device)
    # Without moments: they are twice the weights, and nothing reads them here.
    _, tensors, _ = checkpoint.load(folder, step, prefixes=("parameter.", "buffer."))
    state = TrainState(recipe)
    state.fill(tensors)
    return state.decoder.eval()


def fingerprint(decoder: Decoder) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hold(run: Run) -> Run:
    """Make `run` the one that the next `start`, `resume` or end of the process stops."""
    if not _runs:
        atexit.register(stop_running, "its process ended", timeout=_EXIT_SECONDS)
    _runs[:] = [run]
    return run


def stop_running(reason: str, timeout: float | None = None, *, folder: Path | None = None) -> None:
    """Stop the run of this process (given `folder`: if that is its folder), unless it has ended, and wait for it."""
    for run in tuple(_runs):
        if folder in (None, run.folder):
            run.halt(reason, timeout)


def refuse_other_text(folder: Path, text: Text) -> None:
    """Raise `ValueError`, in one line, unless `text` is what the run in `folder` was started on."""
    with closing(connect(folder, "ro")) as connection:
        recorded = read_meta(connection).text_fingerprint
    if text.fingerprint == recorded:
        return
    python = json.loads((folder / "environment.json").read_bytes())["python"]["version"]
    raise ValueError(
        f"{folder.name} was trained on the text {recorded[:12]} and {', '.join(text.names)} now read as "
        f"{text.fingerprint[:12]}: documents, split or tokenizer have changed "
        f"(recorded with Python {python}, this is {platform.python_version()})"
    )


def hardware(recipe: Recipe) -> dict[str, Any]:
    """What of this process and its devices a result may depend on."""
    return {
        "device": recipe.device,
        "gpu": torch.cuda.get_device_name(recipe.device) if recipe.device.startswith("cuda") else None,
        "num_threads": recipe.num_threads,
        "total_steps": recipe.steps,
    }
