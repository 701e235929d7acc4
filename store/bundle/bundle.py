"""One file that carries evidence, runs and policies between stores: packed, looked into, merged.

Rows keep their digests as identity and lose what only their own store or machine knows: row numbers, runs that never
finished, and paths (a model that was named by a path is called by its last part, marked). The same content gives the
same bytes. A bundle may come from a stranger: it is checked whole before a store is touched, and a merge is one
transaction. How the file is made up (`bundle_file`) and what a row may hold (`bundle_rows`) is told elsewhere.
"""

import itertools
import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Table, insert, select

from profiles.hardware.software import draftpick_version
from profiles.records.codec import decode, environment_from, model_from
from profiles.records.core import Environment, Model
from profiles.records.errors import InputError, NotMeasuredError
from store import migrations, tables
from store.bundle.compare import UnlikeError, is_known
from store.bundle.file import FORMAT, MOST_LINE_BYTES, MOST_ROWS, VERSION, Reading, line_of, reading, write
from store.bundle.rows import (
    TABLES,
    TRACES,
    UNITS,
    Values,
    check_unit,
    checked,
    from_store,
    names_of,
    place_of,
    time_of,
    to_store,
    unit_of,
)
from store.evidence_store import EvidenceStore

MOST_UNIT_ROWS = 100_000
HELD_BYTES = 2**24  # of checked units in memory; the rest on disk
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
    evidence_store: EvidenceStore,
    path: Path,
    *,
    targets: Sequence[str] | None = None,
    environments: Sequence[str] | None = None,
) -> Contents:
    """Writes a bundle, replacing the file in one step.

    `targets`: names, digests or run digests; None: all. `environments`: digests or device names that timings, runs and
    policies are taken of; traces are true on every machine and always come along.
    Raises: NotMeasuredError: there is nothing of that kind. StoreError: a row is damaged. InputError: it is too large,
    or the file cannot be written.
    """
    with evidence_store.reading() as connection:
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
        "draftpick": draftpick_version(),
        "rows": dict(Counter(json.loads(line)[0] for line in lines)),
    }
    write(path, header, lines)
    return inspect(path)


def inspect(path: Path, take: Callable[[Table, list[Values]], None] | None = None) -> Contents:
    """Checks a whole bundle, every row of it, and tells what it holds; touches no store. Raises InputError.

    `take` gets the checked units one by one, before it is known that what follows them is right too.
    """
    rows: Counter[str] = Counter()
    named: dict[str, list[Values]] = {"models": [], "environments": []}
    with reading(path) as file:
        header = _header(file)
        for table, unit in _units(file):
            rows[table.name] += len(unit)
            if table.name in named:
                named[table.name].extend(unit)
            if take is not None:
                take(table, unit)
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


def merge(evidence_store: EvidenceStore, path: Path, *, keep_mine: bool = False) -> Merged:
    """Adds what the store does not have, all of it or, on any refusal, nothing; the second time nothing is new.

    Equal evidence keeps the time and machine under which this store has it; traces of equal tokens are equal when their
    figures are within 0.001, because devices round otherwise. `keep_mine`: where the bundle holds other evidence, the
    store's stays and the rest is merged; acceptance over a trace of other tokens is left out with the trace.
    Raises: InputError: the file is damaged, newer or not allowed. StoreError: it holds other evidence under a key that
    the store has; both values are named.
    """
    merging = _Merging(keep_mine)
    with tempfile.SpooledTemporaryFile(max_size=HELD_BYTES) as file:
        units = _Checked(file)  # before the lock, which keeps all others out and is for comparing and inserting
        inspect(path, units.add)
        with evidence_store.reading() as connection:
            units.keep(lambda table, unit: merging.is_new(connection, table, unit))
        if len(units):
            with evidence_store.writing() as connection:
                for table, unit in units:
                    if merging.is_new(connection, table, unit):
                        merging.added[table.name] += len(unit)
                        connection.execute(insert(table), [to_store(table, row) for row in unit])
                connection.commit()
    return Merged(added=dict(merging.added), known=dict(merging.known), unlike=dict(merging.unlike))


class _Merging:
    """What a merge did so far, and what is to be done with a unit."""

    def __init__(self, keep_mine: bool) -> None:
        self.added: Counter[str] = Counter()
        self.known: Counter[str] = Counter()
        self.unlike: Counter[str] = Counter()
        self._keep_mine = keep_mine
        self._parted: set[tuple[Any, ...]] = set()  # traces of which the store has other tokens

    def is_new(self, connection: Connection, table: Table, unit: list[Values]) -> bool:
        """Counts a unit that is not. Raises StoreError: the store has another value, and its own was not preferred."""
        trace = tuple(unit[0].get(name) for name in names_of(tables.target_traces))
        try:
            if trace not in self._parted:
                if not is_known(connection, table, unit):
                    return True
                self.known[table.name] += len(unit)
                return False
        except UnlikeError:
            if not self._keep_mine:
                raise
            self._parted |= {trace} if table is tables.target_traces else set()
        self.unlike[table.name] += len(unit)
        return False


class _Checked:
    """Units of a bundle that were checked, in a file of their own as long as a merge takes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places = array("q")

    def __len__(self) -> int:
        return len(self._places)

    def add(self, table: Table, unit: list[Values]) -> None:
        self._places.append(self._file.tell())
        self._file.write(json.dumps([table.name, unit]).encode() + b"\n")

    def __iter__(self) -> Iterator[tuple[Table, list[Values]]]:
        for place in self._places:
            yield self._at(place)

    def keep(self, wanted: Callable[[Table, list[Values]], bool]) -> None:
        self._places = array("q", (place for place in self._places if wanted(*self._at(place))))

    def _at(self, place: int) -> tuple[Table, list[Values]]:
        self._file.seek(place)
        name, unit = json.loads(self._file.readline())
        return TABLES[name], unit


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


def _without(row: Values, key: str) -> Values:
    return {name: value for name, value in row.items() if name != key}
