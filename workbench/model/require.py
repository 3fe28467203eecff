"""Refusing a caller's value in one line."""

from __future__ import annotations

from typing import Any


def require(holds: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `holds`."""
    if not holds:
        raise ValueError(message)


def require_positive(owner: Any, *names: str) -> None:
    """Raise `ValueError` naming the first of `owner`'s fields `names` that is not a whole number above zero."""
    for name in names:
        value = getattr(owner, name)
        require(type(value) is int and value > 0, f"{name}={value!r} must be a whole number above 0")
