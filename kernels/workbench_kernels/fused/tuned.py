"""Launch parameters that were measured on one device take the place of the picker's.

`python kernels/bench/tune.py` measures and writes `tuned/<device>.json`; nothing is ever measured inside an op.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from workbench_kernels.fused.interpreter import interpreting

Launch = TypeVar("Launch")
FOLDER = Path(__file__).parent / "tuned"


class Tuned:
    """The measured launches of one device, by kernel and shape, and all that were asked for in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.launches: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.asked: dict[str, object] = {}

    def choose(self, key: str, picked: Launch) -> Launch:
        """The measured launch of this kernel and shape, or else the one that the picker chose.

        Raises:
            ValueError: the file's entry is not a launch of this kernel.
        """
        self.asked[key] = picked
        if key not in self.launches:
            return picked
        try:
            return type(picked)(**self.launches[key])
        except TypeError as error:
            raise ValueError(f"{self.path}: {key!r} is no {type(picked).__name__}: {error}") from None

    def set(self, key: str, launch: object) -> None:
        """Choose `launch` from now on; `save` makes it last."""
        self.launches[key] = asdict(launch)  # pyright: ignore[reportArgumentType]

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.launches, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@cache
def tuned(device_name: str) -> Tuned:
    """What was measured on devices of this name; read once."""
    return Tuned(FOLDER / f"{device_name.replace(' ', '_')}.json")


def chosen(picked: Launch, kernel: str, device: torch.device, **shape: int) -> Launch:
    """The launch to use for `kernel` on this shape; the interpreter takes what was picked."""
    if interpreting():
        return picked
    numbers = " ".join(f"{name}={value}" for name, value in shape.items())
    return tuned(torch.cuda.get_device_name(device)).choose(f"{kernel} {numbers}", picked)
