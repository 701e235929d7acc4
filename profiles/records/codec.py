"""Records to JSON and back: one strict codec for policies, report data, stored rows and recordings.

A mapping, whose keys may be tuples, is a list of `[key parts..., value]` in JSON. Serving code imports this module.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_origin, get_type_hints

import msgspec

from profiles.records.errors import InputError
from profiles.records.text import shortened

Record = TypeVar("Record")


def to_builtins(record: Any) -> Any:
    """A record as JSON values: dicts, lists or tuples, strings, numbers, booleans and None."""
    return msgspec.to_builtins(record, enc_hook=_encode)


def to_json(record: Any) -> str:
    """A record as compact JSON, its fields in their order. Raises InputError: a number is not finite."""
    try:
        return json.dumps(to_builtins(record), separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InputError(f"a {type(record).__name__} holds a number that is not finite") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The JSON values in `text`. Raises InputError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InputError(f"{where} is not a JSON document: {error}") from error


def from_json(kind: type[Record], text: str | bytes, where: str, *, newest_version: int | None = None) -> Record:
    """The record in a JSON document; see `from_builtins`. Raises InputError."""
    return from_builtins(kind, parse_json(text, where), where, newest_version=newest_version)


def from_builtins(kind: type[Record], raw: Any, where: str, *, newest_version: int | None = None) -> Record:
    """JSON values as an instance of `kind`: a record or any type made of records, tuples and plain values.

    `newest_version`: of a record with a `version`; documents of older versions are read as this one, which only added
    fields with defaults.
    Raises InputError, naming the path under `where`: a type or value is not allowed, a field is missing, a key is
    unknown, or the version is newer.
    """
    if newest_version is not None and isinstance(raw, dict) and type(raw.get("version")) is int:
        if raw["version"] > newest_version:
            reads = f"is newer than version {newest_version}, which this draftpick reads: upgrade draftpick"
            raise InputError(f"{where} version {raw['version']} {reads}")
        raw = {**raw, "version": newest_version} if raw["version"] >= 1 else raw
    try:
        record = msgspec.convert(_with_mappings(kind, raw, where), kind)
        _refuse_unknown_keys(raw, to_builtins(record), where)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(_explain(error, raw, where)) from error
    return record


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [[*(key if isinstance(key, tuple) else (key,)), item] for key, item in value.items()]
    for kind in (str, int, float):  # subclasses: torch's version, numpy's numbers
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a record holds a {type(value).__name__}")


def _explain(error: Exception, raw: Any, where: str) -> str:
    """The message of msgspec with the path and the value at it."""
    message, _, path = str(error).partition(" - at `$")
    path = path.removesuffix("`")
    if not message.startswith(("Expected", "Invalid")) or "..." in path:
        return f"{where}{path}: {message}"
    value = raw
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name] if name else value[int(index)]
    return f"{where}{path} is {shortened(json.dumps(value, default=str))}: {message}"


@cache
def _mapping_fields(kind: Any) -> tuple[str, ...]:
    if not hasattr(kind, "__dataclass_fields__"):
        return ()
    return tuple(name for name, hint in get_type_hints(kind).items() if get_origin(hint) is Mapping)


def _with_mappings(kind: Any, raw: Any, where: str) -> Any:
    """The fields of `kind` that are mappings, from their lists of entries."""
    if not isinstance(raw, Mapping):
        return raw
    values = {str(name): value for name, value in raw.items()}  # column names are a subclass, which msgspec refuses
    for name in _mapping_fields(kind):
        if isinstance(values.get(name), list | tuple):
            values[name] = _mapping(values[name], f"{where}.{name}")
    return values


def _mapping(entries: Sequence[Any], where: str) -> dict[Any, Any]:
    if not all(isinstance(entry, list | tuple) and len(entry) >= 2 for entry in entries):
        raise InputError(f"{where}: a list of entries [key parts..., value] is needed")
    try:
        mapping = {entry[0] if len(entry) == 2 else tuple(entry[:-1]): entry[-1] for entry in entries}
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
    if len(mapping) != len(entries):
        raise InputError(f"{where} has a key twice")
    return mapping


def _refuse_unknown_keys(raw: Any, decoded: Any, where: str) -> None:
    """Raises InputError: `raw` has a key that its record, `decoded`, does not have; msgspec drops these."""
    if isinstance(raw, Mapping) and isinstance(decoded, dict):
        for name, value in raw.items():
            if name not in decoded:
                raise InputError(f"{where}: unknown key {name!r}; allowed are {', '.join(decoded)}")
            _refuse_unknown_keys(value, decoded[name], f"{where}.{name}")
    elif isinstance(raw, list | tuple) and raw and isinstance(raw[0], dict | list):
        for index, (item, other) in enumerate(zip(raw, decoded, strict=True)):
            _refuse_unknown_keys(item, other, f"{where}[{index}]")
