"""JSON that round-trips every Python float and refuses what it cannot give back.

Finite floats are written by `repr`, which is exact. NaN and the infinities, which JSON lacks, are written as
`{"float": "nan" | "inf" | "-inf"}` (the sign and payload of a NaN are not kept). A mapping whose only key is `float` is
therefore refused, and so are tuples, keys that are no strings and anything else that would come back changed.
"""

from __future__ import annotations

import json
import math
from typing import Any

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(value: Any) -> str:
    """Standard JSON text of `value`, with sorted keys.

    Raises:
        ValueError: a part of `value` would not come back equal; the line names the part.
    """
    return json.dumps(_encoded(value, "value"), sort_keys=True, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """The value that `dumps` wrote.

    Raises:
        ValueError: the text is not JSON.
    """
    return json.loads(text, object_hook=_decoded, parse_constant=_refuse_constant)


def _encoded(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [_encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is dict:
        if set(value) == {"float"}:
            raise ValueError(f"{where} has 'float' as its only key, which is kept for NaN and infinities")
        for key in value:
            if type(key) is not str:
                raise ValueError(f"{where} has the key {key!r}; keys must be str")
        return {key: _encoded(item, f"{where}.{key}") for key, item in value.items()}
    allowed = "None, bool, int, float, str, list or dict"
    raise ValueError(f"{where} is of type {type(value).__name__}; only {allowed} can be written to JSON exactly")


def _decoded(mapping: dict[str, Any]) -> Any:
    if set(mapping) == {"float"} and mapping["float"] in _NON_FINITE:
        return _NON_FINITE[mapping["float"]]
    return mapping


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
