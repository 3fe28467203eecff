"""What a reader can turn in a live view; the front end makes labelled, keyboard-operable inputs of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Slider:
    """Whole numbers from `minimum` to `maximum`; None is the right end, which follows the newest."""

    name: str
    label: str
    minimum: int
    maximum: int
    value: int | None = None


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number typed in; `value` is the text shown at first."""

    name: str
    label: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of `options`."""

    name: str
    label: str
    options: tuple[str, ...]
    value: str


@dataclass(frozen=True, kw_only=True)
class Action:
    """A button that sends the text of its `fields`. While not `enabled` it can be focused and says `why`."""

    name: str
    label: str
    enabled: bool = True
    why: str = ""
    fields: tuple[Number, ...] = ()


Control = Slider | Number | Choice | Action


def encode(control: Control) -> dict[str, Any]:
    """The control as JSON."""
    return {"kind": type(control).__name__.lower(), **asdict(control)}


def parse_number(label: str, text: object) -> float:
    """The number in what a reader typed.

    Raises:
        ValueError: it is none, or not finite.
    """
    try:
        value = float(str(text).strip())
    except ValueError:
        raise ValueError(f"{label}: {text!r} is not a number; write it like 0.0003 or 3e-4") from None
    if not math.isfinite(value):
        raise ValueError(f"{label}: {text!r} must be a finite number")
    return value


def parse_count(label: str, text: object) -> int:
    """The whole number, at least 1, in what a reader typed.

    Raises:
        ValueError: it is none.
    """
    value = parse_number(label, text)
    if value != int(value) or value < 1:
        raise ValueError(f"{label}: {text!r} must be a whole number, at least 1")
    return int(value)
