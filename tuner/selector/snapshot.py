"""What was learned as JSON values, and back: parts name the attributes that they learn in `LEARNED`, and have a key."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def save(parts: Iterable[Any]) -> dict[str, list[Any]]:
    """The learned values of parts, by key."""
    return {part.key: [_copy(getattr(part, name)) for name in part.LEARNED] for part in parts}


def load(parts: Iterable[Any], values: Mapping[str, Any], *, strict: bool = True) -> None:
    """Takes over what `save` gave of parts with these keys; unless `strict` others stay as they are.

    Raises LookupError, ValueError or TypeError: of other parts, or not finite.
    """
    for part in parts:
        if strict or part.key in values:
            for name, value in zip(part.LEARNED, values[part.key], strict=True):
                setattr(part, name, _alike(getattr(part, name), value))


def _copy(value: Any) -> Any:
    return [_copy(each) for each in value] if isinstance(value, list | tuple) else value


def _alike(present: Any, value: Any) -> Any:
    """The value in the form of the present one."""
    if isinstance(present, list | tuple):
        return type(present)([_alike(old, new) for old, new in zip(present, value, strict=True)])
    if not math.isfinite(value):
        raise ValueError(f"a value of {value}")
    return type(present)(value)
