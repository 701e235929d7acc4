"""One file that carries evidence, runs and policies between stores: packed, looked into, merged.

Rows keep their digests as identity and lose what only their own store or machine knows: row numbers, runs that never
finished, and paths (a model that was named by a path is called by its last part, marked). The same content gives the
same bytes. A bundle may come from a stranger: it is checked whole before a store is touched, and a merge is one
transaction. How the file is made up (`bundle_file`) and what a row may hold (`bundle_rows`) is told elsewhere.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select

from profiles.errors import InputError, NotMeasuredError, StoreError
from profiles.packages import own_version
from profiles.recorded import environment_from, model_from
from profiles.terms import Environment, Model
from store import bundle_evidence, evidence, migrations, tables
from store.book import Book
from store.bundle_file import (
    FORMAT,
    MOST_LINE_BYTES,
    MOST_ROWS,
    VERSION,
    Reading,
    line_of,
    reading,
    write,
)
from store.bundle_rows import (
    TABLES,
    TRACES,
    UNITS,
    Values,
    check_unit,
    checked,
    columns_of,
    from_store,
    names_of,
    place_of,
    time_of,
    to_store,
    unit_of,
)
from tuner.records import decode

MOST_UNIT_ROWS = 100_000
SAME_FIGURE = 1e-3
SCHEMA = re.compile(r"[0-9]{4}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a bundle holds. `created` is the time of its newest row, so that the same content gives the same file."""

    path: str
    version: int
    schema: str
    created: str
    draftpick: str
    sha256: str
    packed_bytes: int
    unpacked_bytes: int
    rows: dict[str, int]
    targets: tuple[Model, ...]
    environments: tuple[Environment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Rows by table that a merge added, that the store had already, and that it left out for the store's own."""

    added: dict[str, int]
    known: dict[str, int]
    unlike: dict[str, int] = field(default_factory=dict)


def pack(
    book: Book, path: Path, *, targets: Sequence[str] | None = None, environments: Sequence[str] | None = None
) -> Contents:
    """Writes a bundle, replacing the file in one step.

    `targets`: names, digests or run digests; None: all. `environments`: digests or device names that timings, runs and
    policies are taken of; traces are true on every machine and always come along.
    Raises: NotMeasuredError: there is nothing of that kind. StoreError: a row is damaged. InputError: it is too large,
    or the file cannot be written.
    """
    with book.reading() as connection:
        models = chosen(connection, tables.models, targets)
        machines = chosen(connection, tables.environments, environments)
        found = {table.name: _rows_of(connection, table, models, machines) for table in tables.ABOUT_TARGETS}
        about = [row for rows in found.values() for row in rows]
        for table, column in ((tables.models, "target_key"), (tables.environments, "environment_digest")):
            [key] = names_of(table)
            used = {row[column] for row in about}
            stored = connection.execute(select(table)).mappings()
            found[table.name] = [from_store(table, dict(row)) for row in stored if row[key] in used]
    if not about:
        raise NotMeasuredError("the store has nothing to pack of what was asked")
    lines: list[bytes] = []
    for table in TABLES.values():
        placed = {place_of(table, row): row for row in found[table.name]}
        lines.extend(line_of([table.name, placed[place]]) for place in sorted(placed))
    if len(lines) > MOST_ROWS or max(map(len, lines)) > MOST_LINE_BYTES:
        raise InputError(f"{len(lines)} rows, or one of them, are too much for a bundle: pack fewer targets")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "schema": migrations.HEAD,
        "created": max(time_of(tables.metadata.tables[name], row) for name, rows in found.items() for row in rows),
        "draftpick": own_version(),
        "rows": dict(Counter(json.loads(line)[0] for line in lines)),
    }
    write(path, header, lines)
    return inspect(path)


def inspect(path: Path) -> Contents:
    """Checks a whole bundle, every row of it, and tells what it holds; touches no store. Raises InputError."""
    rows: Counter[str] = Counter()
    named: dict[str, list[Values]] = {"models": [], "environments": []}
    with reading(path) as file:
        header = _header(file)
        for table, unit in _units(file):
            rows[table.name] += len(unit)
            if table.name in named:
                named[table.name].extend(unit)
        if rows != Counter(header["rows"]):
            raise InputError(f"it says {header['rows']} of its rows and holds {dict(rows)}")
        return Contents(
            path=str(path),
            version=VERSION,
            schema=header["schema"],
            created=header["created"],
            draftpick=header["draftpick"],
            sha256=file.sha256,
            packed_bytes=file.packed_bytes,
            unpacked_bytes=file.unpacked_bytes,
            rows=dict(rows),
            targets=tuple(model_from(_without(row, "key")) for row in named["models"]),
            environments=tuple(environment_from(_without(row, "digest")) for row in named["environments"]),
        )


def check(path: Path) -> int | None:
    """Checks all of a file that `merge` takes: None for a bundle, else the sweeps of an evidence file.

    Raises InputError.
    """
    if bundle_evidence.is_file(path):
        return bundle_evidence.check(path)
    inspect(path)
    return None


def merge(book: Book, path: Path, *, keep_mine: bool = False) -> Merged:
    """Adds what the store does not have, all of it or, on any refusal, nothing; the second time nothing is new.

    Equal evidence keeps the time and machine under which this store has it; traces of equal tokens are equal when their
    figures are within 0.001, because devices round otherwise. `keep_mine`: where the bundle holds other evidence, the
    store's stays and the rest is merged; acceptance over a trace of other tokens is left out with the trace. Takes a
    file of `profiles.evidence.make` too. Raises: InputError: the file is damaged, newer or not allowed. StoreError: it
    holds other evidence under a key that the store has; both values are named.
    """
    swept = check(path)  # without a lock, which then is held no longer than the rows take
    if swept is not None:
        loaded = evidence.load(book, path)
        return Merged(added={"step_times": loaded}, known={"step_times": swept - loaded})
    added: Counter[str] = Counter()
    known: Counter[str] = Counter()
    unlike: Counter[str] = Counter()
    parted: set[tuple[Any, ...]] = set()  # traces of which the store has other tokens
    with book.writing() as connection, reading(path) as file:
        _header(file)
        for table, unit in _units(file):
            trace = tuple(unit[0].get(name) for name in names_of(tables.target_traces))
            try:
                is_known = trace not in parted and _is_known(connection, table, unit)
            except _UnlikeError:
                if not keep_mine:
                    raise
                parted |= {trace} if table is tables.target_traces else set()
                unlike[table.name] += len(unit)
                continue
            if trace in parted:
                unlike[table.name] += len(unit)
                continue
            (known if is_known else added)[table.name] += len(unit)
            if not is_known:
                connection.execute(insert(table), [to_store(table, row) for row in unit])
        connection.commit()
    return Merged(added=dict(added), known=dict(known), unlike=dict(unlike))


# --- out of a store ---


def chosen(connection: Connection, table: Table, asked: Sequence[str] | None) -> set[str]:
    """The keys of the models or machines that were asked for. Raises NotMeasuredError: one is not there."""
    by = ("key", "digest", "name") if table is tables.models else ("digest", "device")
    rows = [dict(row) for row in connection.execute(select(table)).mappings()]
    for one in asked or ():
        if not any(one == row[name] for row in rows for name in by):
            raise NotMeasuredError(f"the store knows nothing of {one!r}, which was to be packed")
    return {row[by[0]] for row in rows if asked is None or any(row[name] in asked for name in by)}


def _rows_of(connection: Connection, table: Table, models: set[str], machines: set[str]) -> list[Values]:
    stored = connection.execute(select(table).order_by(table.c.id)).mappings()
    return [
        from_store(table, dict(row))
        for row in stored
        if row["target_key"] in models
        and (table.name in TRACES or row["environment_digest"] in machines)
        and (table is not tables.runs or row["finished_at"] is not None)
    ]


# --- out of a file ---


def _header(file: Reading) -> dict[str, Any]:
    header = file.header
    kinds = {"format": str, "version": int, "schema": str, "created": str, "draftpick": str}
    if set(header) != {*kinds, "rows"}:
        raise InputError(f"its header has the keys {', '.join(header)[:200]}")
    for name, kind in kinds.items():
        decode(kind, header[name], name)
    if header["format"] != FORMAT or header["version"] != VERSION:
        raise InputError(f"its header is of {header['format']!r} version {header['version']}")
    schema, newest = header["schema"], migrations.HEAD
    if not SCHEMA.fullmatch(schema):
        raise InputError(f"schema {schema[:60]!r}: four digits are needed")
    if schema > newest:
        raise InputError(f"it has schema {schema}, this draftpick reads up to {newest}: upgrade draftpick")
    if not isinstance(header["rows"], dict) or not set(header["rows"]) <= set(TABLES):
        raise InputError("its header counts the rows of tables that are not known")
    for name, count in header["rows"].items():
        decode(int, count, f"rows of {name}")
    return header


def _units(file: Reading) -> Iterator[tuple[Table, list[Values]]]:
    """The checked rows, those of a unit together; what a row refers to came before it."""
    refer = _References()
    for _, placed in itertools.groupby(_placed_rows(file), key=lambda item: unit_of(*item)):
        rows = []
        for table, row in placed:
            rows.append(row)
            refer.check(table, row)
            if len(rows) > MOST_UNIT_ROWS:
                raise InputError(f"{table.name}: a unit has more than the {MOST_UNIT_ROWS} rows that are allowed")
        if table.name in UNITS:
            check_unit(table, rows)
        yield table, rows


def _placed_rows(file: Reading) -> Iterator[tuple[Table, Values]]:
    last: tuple[Any, ...] = ()
    for item in file.rows():
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and item[0] in TABLES):
            raise InputError("a line is not a table's name and a row")
        table = TABLES[item[0]]
        row = checked(table, item[1])
        place = place_of(table, row)
        if not last < place:
            raise InputError(f"{table.name}: a row is there twice or out of order")
        last = place
        yield table, row


class _UnlikeError(StoreError):
    """The store has other evidence under the key of a unit."""


class _References:
    """The models, machines and target traces that were seen, which later rows are about."""

    def __init__(self) -> None:
        self._keys: dict[str, set[str]] = {"models": set(), "environments": set()}
        self._tokens: dict[tuple[str, ...], int] = {}

    def check(self, table: Table, row: Values) -> None:
        """Raises InputError: the row is about something that the bundle does not hold, or about its other length."""
        if table.name in self._keys:
            self._keys[table.name].add(row[names_of(table)[0]])
            return
        for name, column in (("models", "target_key"), ("environments", "environment_digest")):
            if row[column] not in self._keys[name]:
                raise InputError(f"{table.name}: {column} {row[column]} is not among the bundle's {name}")
        if table.name in TRACES:
            trace = tuple(row[name] for name in names_of(tables.target_traces))
            size = len(row[{"target_traces": "token_ids", "acceptance_traces": "keep_probs"}.get(table.name, "kept")])
            if table is tables.target_traces:
                self._tokens[trace] = size
            elif self._tokens.get(trace) != size:
                raise InputError(
                    f"{table.name}: {size} positions over a target trace of {self._tokens.get(trace, 'no')} tokens"
                )


# --- into a store ---


def _is_known(connection: Connection, table: Table, unit: list[Values]) -> bool:
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
    ignored = {*tables.LABELS, tables.time_name(table.name), "name", "revision"}
    ignored |= {"environment_digest"} if table.name in TRACES else set()
    name = UNITS[table.name][0] if table.name in UNITS else None
    shown = ", ".join(f"{key} {unit[0][key]}" for key in ((name,) if name else names_of(table)))
    refused = f"unlike evidence in {table.name} under {shown}"
    if len(stored) != len(unit):
        raise _UnlikeError(f"{refused}: {len(stored)} rows in the store, {len(unit)} in the bundle: nothing is merged")
    for old, new in zip(stored, unit, strict=True):
        for column in (column.name for column in columns_of(table)):
            unknown = table is tables.environments and None in (old[column], new[column])
            if column not in ignored and not unknown and not _is_alike(table, old[column], new[column]):
                place, *both = _difference(column, old[column], new[column], rounded=table.name in TRACES)
                raise _UnlikeError(
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


def _without(row: Values, key: str) -> Values:
    return {name: value for name, value in row.items() if name != key}
