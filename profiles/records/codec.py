"""Turns plain JSON back into frozen records, checking every key and value on the way.

Whoever keeps records as JSON reads them through this, so that a file edited by hand is refused in one line. It must
not know which records these are. Standard library only: serving code reads policies with it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from profiles.records.core import Draft, Environment, Model, Workload
from profiles.records.errors import InputError
from profiles.records.evidence import (
    Acceptance,
    AcceptanceTrace,
    LookupTrace,
    RoundCount,
    Sample,
    StepShape,
    StepTimes,
    TargetTrace,
)


def plain(value: Any) -> Any:
    """A record as JSON values: fields to a dict, tuples to lists, a mapping to a list of [key parts..., value]."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return [[*(key if isinstance(key, tuple) else (key,)), plain(item)] for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def model_from(data: Mapping[str, Any]) -> Model:
    return Model(**data)


def environment_from(data: Mapping[str, Any]) -> Environment:
    return Environment(**data)


def workload_from(data: Mapping[str, Any]) -> Workload:
    return Workload(**_tuples(data))


def draft_from(data: Mapping[str, Any]) -> Draft:
    return Draft(**{**data, "model": None if data["model"] is None else model_from(data["model"])})


def target_trace_from(data: Mapping[str, Any]) -> TargetTrace:
    return TargetTrace(**_tuples(data))


def acceptance_trace_from(data: Mapping[str, Any]) -> AcceptanceTrace:
    return AcceptanceTrace(**_tuples(data))


def lookup_trace_from(data: Mapping[str, Any]) -> LookupTrace:
    return LookupTrace(**_tuples(data))


def acceptance_from(data: Mapping[str, Any]) -> Acceptance:
    return lookup_trace_from(data) if "max_length" in data else acceptance_trace_from(data)


def step_times_from(data: Mapping[str, Any]) -> StepTimes:
    samples_s = {width: tuple(samples) for width, samples in data["samples_s"]}
    return StepTimes(**{**data, "samples_s": samples_s})


def sample_from(data: Mapping[str, Any]) -> Sample:
    rounds = {RoundCount(proposed, accepted): count for proposed, accepted, count in data["rounds"]}
    shapes = {StepShape(*shape): count for *shape, count in data["shapes"]}
    return Sample(**{**data, "rounds": rounds, "shapes": shapes})


Decoder = Callable[[Any], Any]


_NEEDED = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


class _WrongError(Exception):
    """A value at `place` under what is decoded does not fit; `place` grows on the way up, outermost first."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.message, self.place = message, place

    def under(self, place: str) -> "_WrongError":
        return _WrongError(self.message, place + self.place)


def decode(kind: Any, raw: object, where: str) -> Any:
    """`raw` JSON as an instance of `kind`: a record, a tuple of one type, an optional, or a plain value.

    Raises InputError, naming the place under `where`, the value and what is allowed.
    """
    try:
        return _decoder(kind)(raw)
    except _WrongError as error:
        raise InputError(f"{where}{error.place}{error.message}") from error


def decode_version(kind: Any, raw: object, where: str, newest: int) -> Any:
    """As `decode`, for a record with a `version`: older ones are read as the newest, which only added fields.

    Raises InputError, also for a version newer than `newest`.
    """
    if isinstance(raw, dict) and type(raw.get("version")) is int:
        version = raw["version"]
        if version > newest:
            raise InputError(
                f"{where} version {version} is newer than version {newest}, which this draftpick reads: upgrade"
            )
        if version >= 1:
            raw = {**raw, "version": newest}
    return decode(kind, raw, where)


@cache
def _decoder(kind: Any) -> Decoder:
    """The function that turns JSON into a `kind`; made once, because a policy holds hundreds of records."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _record_decoder(kind)
    if get_origin(kind) is UnionType:  # X | None is the only union in the records
        inner = _decoder(next(one for one in get_args(kind) if one is not type(None)))
        return lambda raw: None if raw is None else inner(raw)
    if get_origin(kind) is tuple:
        return _tuple_decoder(_decoder(get_args(kind)[0]))
    return _value_decoder(str if get_origin(kind) is Literal else kind)


def _value_decoder(kind: type) -> Decoder:
    exact = {int, float} if kind is float else {kind}  # `type` tells JSON's true, a Python int, from a number

    def decode_value(raw: Any) -> Any:
        if type(raw) not in exact:
            raise _WrongError(f" is {_show(raw)}: {_NEEDED[kind]} is needed")
        if kind is float and not abs(raw) < 1e300:  # JSON's NaN and 1e999 are floats
            raise _WrongError(f" is {_show(raw)}: a finite number is needed")
        return kind(raw)

    return decode_value


def _tuple_decoder(inner: Decoder) -> Decoder:
    def decode_tuple(raw: Any) -> Any:
        if not isinstance(raw, list):
            raise _WrongError(f" is {_show(raw)}: a list is needed")
        found = []
        try:
            for one in raw:
                found.append(inner(one))
        except _WrongError as error:
            raise error.under(f"[{len(found)}]") from error
        return tuple(found)

    return decode_tuple


def _record_decoder(record: type) -> Decoder:
    hints = get_type_hints(record)
    names = [field.name for field in fields(record)]
    added = {field.name for field in fields(record) if "added" in field.metadata}  # by a later version, with a default
    inner = {name: _decoder(hints[name]) for name in names}

    def decode_record(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _WrongError(f" is {_show(raw)}: an object is needed")
        for key in raw:
            if key not in inner:
                raise _WrongError(f" has the unknown key {key!r}: allowed are {', '.join(names)}")
        values = {}
        for name in names:
            if name in raw:
                try:
                    values[name] = inner[name](raw[name])
                except _WrongError as error:
                    raise error.under(f".{name}") from error
            elif name not in added:
                raise _WrongError(f" lacks the key {name!r}: needed are {', '.join(names)}")
        try:
            return record(**values)
        except InputError as error:
            raise _WrongError(f": {error}") from error

    return decode_record


def _show(raw: object) -> str:
    text = json.dumps(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."
