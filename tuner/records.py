"""Turns plain JSON back into frozen records, checking every key and value on the way.

Whoever keeps records as JSON reads them through this, so that a file edited by hand is refused in one line. It must
not know which records these are. Standard library only: serving code reads policies with it.
"""

import json
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from profiles.errors import InputError


def decode(kind: Any, raw: object, where: str) -> Any:
    """`raw` JSON as an instance of `kind`: a record, a tuple of one type, an optional, or a plain value.

    Raises InputError, naming the place under `where`, the value and what is allowed.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, raw, where)
    if get_origin(kind) is UnionType:  # X | None is the only union in the records
        inner = next(one for one in get_args(kind) if one is not type(None))
        return None if raw is None else decode(inner, raw, where)
    if get_origin(kind) is tuple:
        _require(isinstance(raw, list), f"{where} is {_show(raw)}: a list is needed")
        assert isinstance(raw, list)
        return tuple(decode(get_args(kind)[0], one, f"{where}[{index}]") for index, one in enumerate(raw))
    kind = str if get_origin(kind) is Literal else kind
    allowed = (int, float) if kind is float else (kind,)
    # JSON's true is a Python int, and its NaN and 1e999 are floats
    good = isinstance(raw, allowed) and isinstance(raw, bool) == (kind is bool)
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    _require(good, f"{where} is {_show(raw)}: {names[kind]} is needed")
    if kind is float:
        assert isinstance(raw, int | float)
        _require(abs(raw) < 1e300, f"{where} is {_show(raw)}: a finite number is needed")
    return kind(raw)


def decode_version(kind: Any, raw: object, where: str, newest: int) -> Any:
    """As `decode`, for a record with a `version`: older ones are read as the newest, which only added fields.

    Raises InputError, also for a version newer than `newest`.
    """
    if isinstance(raw, dict) and type(raw.get("version")) is int:
        version = raw["version"]
        _require(
            version <= newest,
            f"{where} version {version} is newer than version {newest}, which this draftpick reads: upgrade",
        )
        if version >= 1:
            raw = {**raw, "version": newest}
    return decode(kind, raw, where)


def _decode_record(record: type, raw: object, where: str) -> Any:
    _require(isinstance(raw, dict), f"{where} is {_show(raw)}: an object is needed")
    assert isinstance(raw, dict)
    names = [field.name for field in fields(record)]
    for key in raw:
        _require(key in names, f"{where} has the unknown key {key!r}: allowed are {', '.join(names)}")
    for field in fields(record):
        known = field.name in raw or "added" in field.metadata  # what a later version added has a default
        _require(known, f"{where} lacks the key {field.name!r}: needed are {', '.join(names)}")
    values = {name: decode(_hints(record)[name], raw[name], f"{where}.{name}") for name in names if name in raw}
    try:
        return record(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


@cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _show(raw: object) -> str:
    text = json.dumps(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."
