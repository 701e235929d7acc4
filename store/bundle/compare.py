"""Whether a store has what a bundle holds: the same under its key, nothing there, or something else.

Where the rows come from and what is done about them it must not know.
"""

import json
from typing import Any

from sqlalchemy import Connection, Table, select

from profiles.records.errors import StoreError
from store import tables
from store.bundle.rows import TRACES, UNITS, Values, columns_of, from_store, names_of, place_of

SAME_FIGURE = 1e-3


class UnlikeError(StoreError):
    """The store has other evidence under the key of a unit."""


def is_known(connection: Connection, table: Table, unit: list[Values]) -> bool:
    """Whether the store has the unit. Raises StoreError: under its key it has another value."""
    stored = _stored(connection, table, unit[0])
    if not names_of(table):
        return unit[0] in stored
    if stored:
        _check_alike(table, stored, unit)
    return bool(stored)


def _stored(connection: Connection, table: Table, row: Values) -> list[Values]:
    """What the store has under the key of a row's unit, as a bundle would carry it."""
    if table.name in UNITS:
        names: tuple[str, ...] = (UNITS[table.name][0],)
    else:
        names = names_of(table) or ("target_key", "environment_digest", tables.time_name(table.name))
    query = select(table).filter_by(**{name: row[name] for name in names})
    if table is tables.runs:
        query = query.where(table.c.finished_at.is_not(None))
    stored = [from_store(table, dict(found)) for found in connection.execute(query).mappings()]
    return sorted(stored, key=lambda one: place_of(table, one))


def _check_alike(table: Table, stored: list[Values], unit: list[Values]) -> None:
    """Compares what was measured, not what it is called nor when; of a trace not where either."""
    ignored = {*tables.LABELS, tables.time_name(table.name), "name", "revision"}  # type: ignore
    ignored |= {"environment_digest"} if table.name in TRACES else set()
    name = UNITS[table.name][0] if table.name in UNITS else None
    shown = ", ".join(f"{key} {unit[0][key]}" for key in ((name,) if name else names_of(table)))
    refused = f"unlike evidence in {table.name} under {shown}"
    if len(stored) != len(unit):
        raise UnlikeError(f"{refused}: {len(stored)} rows in the store, {len(unit)} in the bundle: nothing is merged")
    for old, new in zip(stored, unit, strict=True):
        for column in (column.name for column in columns_of(table)):
            unknown = table is tables.environments and None in (old[column], new[column])
            if column not in ignored and not unknown and not _is_alike(table, old[column], new[column]):
                place, *both = _difference(column, old[column], new[column], rounded=table.name in TRACES)
                raise UnlikeError(
                    f"{refused}: {place} is {_short(both[0])} in the store, {_short(both[1])} in the bundle: "
                    "nothing is merged"
                )


def _is_alike(table: Table, old: Any, new: Any) -> bool:
    """Whether two values say the same; the figures of a trace may be rounded otherwise."""
    if table.name in TRACES and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(one == other or _is_close(one, other) for one, other in zip(old, new, strict=True))
    return bool(old == new)


def _is_close(one: Any, other: Any) -> bool:
    return isinstance(one, float) and isinstance(other, int | float) and abs(one - other) <= SAME_FIGURE


def _difference(place: str, old: Any, new: Any, *, rounded: bool) -> tuple[str, Any, Any]:
    """The first place where two values part, beyond rounding where that is allowed, and what is there."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            if one != other and not (rounded and _is_close(one, other)):
                return _difference(f"{place}[{index}]", one, other, rounded=rounded)
    return place, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
