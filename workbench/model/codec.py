"""Frozen dataclasses to plain JSON values and back, exactly and strictly."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """JSON-able twin of `value`: a dataclass becomes a mapping with its class name under `kind`.

    Mappings become lists of pairs, since their keys may be dataclasses.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return [[to_plain(key), to_plain(item)] for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{type(value).__name__} cannot be written to JSON")


def from_plain(hint: Any, plain: Any) -> Any:
    """The value of type `hint` that `to_plain` wrote as `plain`.

    Only classes reachable from `hint` are ever built, so a file cannot name a class of its own choosing.

    Raises:
        ValueError: `plain` does not fit `hint`; the line names the field.
    """
    return _read(hint, plain, "value")


def _read(hint: Any, plain: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), plain, where)
    if origin is Literal:
        if plain not in get_args(hint):
            raise ValueError(f"{where}={plain!r} must be one of {', '.join(map(repr, get_args(hint)))}")
        return plain
    if origin is tuple:
        _expect(isinstance(plain, list), where, plain, "a list")
        return tuple(_read(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(plain))
    if origin is not None and issubclass(origin, Mapping):
        _expect(isinstance(plain, list), where, plain, "a list of pairs")
        key_hint, item_hint = get_args(hint)
        return {_read(key_hint, key, where): _read(item_hint, item, where) for key, item in plain}
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, plain, where)
    if isinstance(hint, type) and hint.__subclasses__() and hint not in (int, float, str, bool):
        return _read_union(tuple(_concrete(hint)), plain, where)
    if hint is float and type(plain) is int:
        return float(plain)
    _expect(type(plain) is hint, where, plain, getattr(hint, "__name__", str(hint)))
    return plain


def _concrete(base: type) -> list[type]:
    """The dataclasses among the subclasses of an abstract `base`."""
    below = [c for sub in base.__subclasses__() for c in [sub, *_concrete(sub)]]
    return [c for c in below if dataclasses.is_dataclass(c)]


def _read_union(choices: tuple[Any, ...], plain: Any, where: str) -> Any:
    if plain is None:
        _expect(type(None) in choices, where, plain, "a value")
        return None
    expanded = [
        c for choice in choices for c in (_concrete(choice) or [choice] if isinstance(choice, type) else [choice])
    ]
    if isinstance(plain, dict):
        for choice in expanded:
            if dataclasses.is_dataclass(choice) and getattr(choice, "__name__", "") == plain.get("kind"):
                return _read(choice, plain, where)
        names = ", ".join(getattr(c, "__name__", "") for c in expanded if dataclasses.is_dataclass(c))
        raise ValueError(f"{where} is of unknown kind {plain.get('kind')!r}; known: {names}")
    plain_choices = [c for c in expanded if c is not type(None) and not dataclasses.is_dataclass(c)]
    for choice in plain_choices:
        try:
            return _read(choice, plain, where)
        except ValueError:
            continue
    raise ValueError(f"{where}={plain!r} fits none of {', '.join(map(str, choices))}")


def _read_dataclass(cls: Any, plain: Any, where: str) -> Any:
    _expect(isinstance(plain, dict), where, plain, f"a mapping of kind {cls.__name__}")
    _expect(plain.get("kind") == cls.__name__, where, plain.get("kind"), f"of kind {cls.__name__}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(plain) - set(fields) - {"kind"})
    if unknown:
        raise ValueError(f"{where} has unknown field {unknown[0]!r} ({cls.__name__})")
    missing = [name for name, f in fields.items() if name not in plain and _is_required(f)]
    if missing:
        raise ValueError(f"{where} lacks field {missing[0]!r} ({cls.__name__})")
    return cls(**{name: _read(hints[name], plain[name], f"{where}.{name}") for name in fields if name in plain})


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _expect(holds: bool, where: str, plain: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{where}={plain!r} must be {wanted}")
