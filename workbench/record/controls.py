"""Steering a run: rows that anyone may add and the trainer applies between steps."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from workbench.record.database import connect, naming_damage, read_meta, transaction
from workbench.record.ownership import effective_state
from workbench.record.plain_json import dumps, loads
from workbench.record.snapshot import LIVE_STATES
from workbench.train.events import Change

ControlKind = Literal["pause", "resume", "step", "stop", "set"]


@dataclass(frozen=True)
class Control:
    """One wish. `change` is there for the kind `set` only; `step` asks a paused run for one update."""

    id: int
    kind: ControlKind
    change: Change | None


class Controls:
    """The controls of a run folder, for any process: views send, the trainer takes and confirms.

    Raises:
        ValueError: the folder is no run folder; from every sending method: the run has ended or its process is gone.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        connect(self._folder, "ro").close()

    def pause(self) -> None:
        """Ask the run to wait after the step that it is in."""
        self._send("pause")

    def resume(self) -> None:
        """Ask a paused run to go on."""
        self._send("resume")

    def step(self) -> None:
        """Ask a paused run for one step."""
        self._send("step")

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end."""
        self._send("stop")

    def set(self, *, learning_rate: float | None = None, balance_speed: float | None = None) -> None:
        """Ask for other values from the next step on; None leaves a value as it is.

        Raises:
            ValueError: see `Change`; or a balance speed is set where no bias balances.
        """
        change = Change(learning_rate=learning_rate, balance_speed=balance_speed)
        if balance_speed is not None:
            self._refuse_without_bias()
        self._send("set", change)

    def settings(self) -> tuple[str, ...]:
        """What `set` may change in this run; the balance speed only where a bias balances experts."""
        balanced = self._balance() in (None, "LossFreeBias") and self._has_experts()
        return ("learning_rate", "balance_speed") if balanced else ("learning_rate",)

    def pending(self) -> tuple[Control, ...]:
        """What has been sent and not yet applied, oldest first. About 0.1 ms: the trainer asks before every step."""
        query = "SELECT id, kind, value FROM controls WHERE applied_step IS NULL ORDER BY id"
        with naming_damage(self._folder):
            with closing(connect(self._folder, "ro")) as connection:
                rows = connection.execute(query).fetchall()
            return tuple(_control(*row) for row in rows)

    def applied(self, control_id: int, step: int) -> tuple[tuple[int, str, float], ...]:
        """Confirm a control with the first step that it acts on, and record the values that it set.

        Returns the recorded changes as (step, name, value). `RunWriter.applied` does the same and tells its history.

        Raises:
            ValueError: there is no pending control of that id.
        """
        with closing(connect(self._folder, "rw")) as connection, transaction(connection, "IMMEDIATE"):
            query = "SELECT id, kind, value FROM controls WHERE id = ? AND applied_step IS NULL"
            row = connection.execute(query, (control_id,)).fetchone()
            if row is None:
                raise ValueError(f"control {control_id} of {self._folder} is not pending")
            connection.execute("UPDATE controls SET applied_step = ? WHERE id = ?", (step, control_id))
            change = _control(*row).change
            values = {} if change is None else asdict(change)
            changes = tuple((step, name, float(value)) for name, value in values.items() if value is not None)
            connection.executemany("INSERT INTO changes (step, name, value) VALUES (?, ?, ?)", changes)
            connection.execute("UPDATE status SET commits = commits + 1")
        return changes

    def _refuse_without_bias(self) -> None:
        # Refused here, where somebody reads it, and not by the trainer, whom it would end.
        balance = self._balance()
        if balance not in (None, "LossFreeBias"):
            raise ValueError(f"{self._folder.name} balances by {balance}: it has no balance_speed to set")
        if not self._has_experts():
            raise ValueError(f"{self._folder.name} has no experts: it has no balance_speed to set")

    def _balance(self) -> str | None:
        """The kind of balance that the recipe names, if it names one."""
        return loads((self._folder / "recipe.json").read_bytes()).get("balance", {}).get("kind")

    def _has_experts(self) -> bool:
        with closing(connect(self._folder, "ro")) as connection:
            return read_meta(connection).num_experts > 0

    def _send(self, kind: ControlKind, change: Change | None = None) -> None:
        value = dumps({} if change is None else _plain(change))
        with closing(connect(self._folder, "rw")) as connection, transaction(connection, "IMMEDIATE"):
            state = effective_state(connection)
            if state not in LIVE_STATES:
                raise ValueError(f"{self._folder.name} is {state}: nothing is left to {kind}; resume the run first")
            connection.execute("INSERT INTO controls (kind, value) VALUES (?, ?)", (kind, value))


def _plain(change: Change) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(change).items() if value is not None}


def _control(control_id: int, kind: str, value: str) -> Control:
    assert kind in get_args(ControlKind)
    change = Change(**loads(value)) if kind == "set" else None
    return Control(control_id, cast(ControlKind, kind), change)
