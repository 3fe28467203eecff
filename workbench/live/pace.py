"""Whether a run may make its next step: what pause, resume, step and stop add up to."""

from __future__ import annotations

from workbench.record.controls import ControlKind


class Pace:
    """The sum of the controls so far.

    `step` allows one update and pauses after it, also when the run was not paused before; several add up.
    """

    def __init__(self, *, paused: bool) -> None:
        self.paused = paused
        self.stopped = False
        self._allowed_steps = 0

    @property
    def held(self) -> bool:
        """Whether the next update has to wait."""
        return self.paused and self._allowed_steps == 0

    def take(self, kind: ControlKind) -> None:
        """Follow one control; `set` changes no pace."""
        match kind:
            case "pause" | "resume":
                self.paused = kind == "pause"
                self._allowed_steps = 0
            case "step":
                self.paused = True
                self._allowed_steps += 1
            case "stop":
                self.stopped = True

    def made_step(self) -> None:
        """Count an update against those allowed."""
        if self.paused:
            self._allowed_steps -= 1
