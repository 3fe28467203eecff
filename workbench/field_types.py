"""Plain data holds what its annotations say: a value of another kind is refused where it is given, in one line."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Longer values would fill the screen and hide the name of the field.
_SHOWN_CHARACTERS = 80
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    types.NoneType: "None",
}


def require_types(owner: Any) -> None:
    """Check every field that `owner`, a dataclass, was built from against its annotation.

    A whole number may stand where a number is asked for, but no bool stands for a number; numbers are finite.

    Raises:
        ValueError: the first field whose value does not fit, with its name, its value and what it must be.
    """
    hints = _hints(type(owner))
    for field in fields(owner):
        value = getattr(owner, field.name) if field.init else None
        if field.init and not fits(value, hints[field.name]):
            shown = repr(value)
            shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 3]}..."
            raise ValueError(f"{field.name}={shown} must be {words(hints[field.name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that an annotation names, down to the items of tuples and mappings."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in pairs)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, hint)


def words(hint: Any) -> str:
    """An annotation as a reader would say it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(choice) for choice in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a tuple of {words(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from {words(arguments[0])} to {words(arguments[1])}"
    return _WORDS[hint] if hint in _WORDS else str(hint.__name__)


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)
