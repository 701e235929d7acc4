"""Bundles: small SQLite files of the store's own schema that carry evidence, runs and policies between stores.

A bundle may come from a stranger: it is opened read-only and checked whole before a store is touched, then merged in
short transactions. Rows that cannot travel (damaged ones, and those of a machine with a path or a secret in its engine
options, as 0.5 stored them) are left out and counted.
"""

import hashlib
import itertools
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import sqlalchemy
from sqlalchemy import URL, Column, Connection, Select, Table, insert, select, union

from profiles.records.core import Environment, Model
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.files import open_file, write_atomically
from profiles.records.text import command, printable, shortened
from store import migrations, tables
from store.evidence_store import EvidenceStore, targets_named
from store.forget import LINKED
from store.tables import Row, Values
from tuner.bundle.rows import CHILDREN, PARENTS, TRACES, Item, items, links, primary_key, trace_key

APPLICATION_ID = 0x64707462  # "dptb" in the file's header
MOST_BYTES, MOST_VALUE_BYTES = 2**28, 2**24
BATCH = 100  # items merged in one transaction
MOST_SHOWN = 5
SAME_FIGURE = 1e-3  # devices round probabilities of the same tokens otherwise
# columns that describe or are derived, and tables of which an equal key is all that can be compared
_LABELS = {"id", "measured_at", "name", "revision", "draft_name", "component", "temperature"}
_LABELS |= {"num_accepted", "median_s"}
_FOUND_BY_KEY = {"prompts", "workloads", "setups", "runs", "sweeps", "units", "infeasible", "policies"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a bundle holds; `left_out`: rows of the packed store that could not travel, by table."""

    path: str
    schema: str
    created: str
    sha256: str
    num_bytes: int
    rows: dict[str, int]
    targets: tuple[Model, ...]
    drafts: tuple[str, ...]
    environments: tuple[Environment, ...]
    left_out: dict[str, int]


@dataclass(slots=True)
class Merged:
    """The items of a bundle, by table."""

    added: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)  # the store had them before
    unlike: dict[str, int] = field(default_factory=dict)  # they contradict the store and were not merged
    conflicts: list[str] = field(default_factory=list)  # the first few of these in words
    clamped: int = 0  # evidence with a time in the future, stored with that of the merge, so that it grows old


def pack(evidence_store: EvidenceStore, path: Path, targets: Sequence[str] | None = None) -> Contents:
    """Write a bundle of these targets (None: all), replacing the file in one step.

    Raises: NotMeasuredError: nothing was asked for that the store has. InputError: the file cannot be written.
    """
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bundle"
        with evidence_store.reading() as connection, _new_file(file) as packed:
            conditions = _conditions(connection, targets)

            def leave_out(table: Table, _: InputError) -> None:
                left_out[table.name] += 1

            merging = _Merging()
            for item in items(connection, leave_out, *conditions):
                merging.merge(packed, item)
            if not any(table.name in merging.merged.added for table in tables.ABOUT_TARGETS):
                raise NotMeasuredError("the store has nothing to pack of what was asked")
        data = file.read_bytes()
    data += hashlib.sha256(data).digest()  # SQLite reads what its header counts, and not this
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} would have {len(data)} bytes: {MOST_BYTES} are allowed; pack fewer targets")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    return inspect(path, left_out=dict(left_out))


def inspect(path: Path, *, left_out: dict[str, int] | None = None) -> Contents:
    """Check a whole bundle, every row of it, and describe it; no store is touched. Raises InputError."""
    rows: Counter[str] = Counter()
    targets, machines = [], []
    drafts: set[str] = set()
    created = ""
    for item in _checked_items(path):
        name, row = item.table.name, item.row
        rows[name] += 1
        if item.children:
            rows[CHILDREN[name].name] += len(item.children)
        if item.table is tables.models:
            targets.append(tables.from_row(Model, row))
        elif item.table is tables.environments:
            machines.append(tables.from_row(Environment, row))
        elif item.table is tables.policies:
            drafts.update(str(choice["draft"] or "") for choice in tables.choice_rows(0, row["policy"]))
        drafts.add(row.get("draft_name") or row.get("draft") or "")
        created = max(created, row.get(tables.time_name(name)) or "")
    return Contents(
        path=str(path),
        schema=migrations.HEAD,
        created=created,
        sha256=path.read_bytes()[-32:].hex(),
        num_bytes=path.stat().st_size,
        rows=dict(rows),
        targets=tuple(targets),
        drafts=tuple(sorted(filter(None, drafts))),
        environments=tuple(machines),
        left_out=left_out or {},
    )


def merge(evidence_store: EvidenceStore, path: Path) -> Merged:
    """Add what the store does not have, a hundred items in a transaction; merging again changes nothing.

    The store's own evidence always stays. Acceptance over a target trace of other tokens is not merged either.
    Raises: InputError: the bundle is damaged, newer or not allowed; the store is as it was. StoreError.
    """
    for _ in _checked_items(path):
        pass
    merging = _Merging()
    checked = _checked_items(path)
    while batch := list(itertools.islice(checked, BATCH)):
        with evidence_store.writing() as connection:
            for item in batch:
                merging.merge(connection, item)
            connection.commit()
    return merging.merged


class _Merging:
    """What was added to a store or a new bundle so far, and its keys of the rows that were copied."""

    def __init__(self) -> None:
        self.merged = Merged()
        self._now = datetime.now(UTC).isoformat(timespec="microseconds")
        self._keys: dict[tuple[str, Any], Any] = {}
        self._other_traces: set[tuple[str, ...]] = set()

    def merge(self, connection: Connection, item: Item) -> None:
        table, name = item.table, item.table.name
        row = self._linked(table, item.row)
        identity = _identity(table, row)
        stored = connection.execute(select(table).filter_by(**identity)).mappings().first()
        difference, counts = "", self.merged.stored
        if stored is not None:
            self._keys[name, item.id] = stored[primary_key(table)]
            difference = _difference(table, stored, row) or self._child_difference(connection, item)
        elif name in TRACES and trace_key(row) in self._other_traces:
            difference = "its target trace has other tokens"
        else:
            self._add(connection, item, row)
            counts = self.merged.added
        if difference:
            counts = self.merged.unlike
            if table is tables.target_traces:
                self._other_traces.add(trace_key(row))
            if len(self.merged.conflicts) < MOST_SHOWN:
                key = ", ".join(f"{column} {value}" for column, value in identity.items())
                self.merged.conflicts.append(f"{name} {key}: {difference}")
        counts[name] = counts.get(name, 0) + 1

    def _add(self, connection: Connection, item: Item, row: Values) -> None:
        new = {column: value for column, value in row.items() if column != "id"}
        if new.get("measured_at", "") > self._now and item.table is not tables.infeasible:  # found by its time
            self.merged.clamped += 1
            new["measured_at"] = self._now
        children = [self._linked(CHILDREN[item.table.name], child) for child in item.children]
        self._keys[item.table.name, item.id] = _insert(connection, item.table, new, children)

    def _linked(self, table: Table, row: Values) -> Values:
        """The row with the store's keys in place of the bundle's."""
        keys = {name: self._keys.get((other.name, row[name])) for name, other in links(table).items()}
        return {**row, **keys}

    def _child_difference(self, connection: Connection, item: Item) -> str:
        if not item.children:
            return ""
        child = CHILDREN[item.table.name]
        query = select(child).where(child.c[PARENTS[child.name]] == self._keys[item.table.name, item.id])
        stored = connection.execute(query.order_by(*child.primary_key.columns)).mappings().all()
        if len(stored) != len(item.children):
            return f"{len(stored)} rows in the store, {len(item.children)} in the bundle"
        return next(filter(None, (_difference(child, *pair) for pair in zip(stored, item.children, strict=True))), "")


def _identity(table: Table, row: Values) -> Values:
    """The columns that a row is found by in any store, and their values."""
    unique = [c for c in table.constraints if isinstance(c, sqlalchemy.UniqueConstraint)]
    if unique:
        names = [column.name for column in unique[0].columns]
    elif "target_key" in table.c:
        names = ["target_key", "environment_digest", tables.time_name(table.name)]
        names += ["setup_id"] if table is tables.infeasible else []
    else:
        names = [primary_key(table)]
    return {name: row[name] for name in names}


def _difference(table: Table, old: Row, new: Row) -> str:
    """What two rows under one key measured differently; empty where nothing."""
    if table.name in _FOUND_BY_KEY:
        return ""
    for name in {column.name for column in table.c} - _LABELS - links(table).keys():
        is_known = None not in (old[name], new[name])
        if is_known and not _is_alike(old[name], new[name], rounded=table.name in TRACES):
            return f"{name} is {shortened(str(old[name]))} in the store, {shortened(str(new[name]))} in the bundle"
    return ""


def _is_alike(old: Any, new: Any, *, rounded: bool) -> bool:
    if not rounded or not isinstance(old, tuple) or not isinstance(old[0], float):
        return bool(old == new)
    return len(old) == len(new) and all(abs(a - b) <= SAME_FIGURE for a, b in zip(old, new, strict=True))


# --- out of a store ---


def _conditions(connection: Connection, targets: Sequence[str] | None) -> Iterator[Any]:
    """Which rows are packed. Raises NotMeasuredError: the store does not know a target."""
    models: set[str] = set()
    for name in [None] if targets is None else targets:
        named = targets_named(connection, name)
        if name is not None and not named:
            raise NotMeasuredError(f"the store knows nothing of {name!r}, which was to be packed")
        models.update(model.run_digest for model in named)
    for table in tables.ABOUT_TARGETS:
        yield table.c.target_key.in_(models)
    yield tables.runs.c.finished_at.is_not(None)

    def of_models(column: Column[Any]) -> Select[Any]:
        if "target_key" in column.table.c:
            return select(column).where(column.table.c.target_key.in_(models))
        return select(column).join(tables.units).where(tables.units.c.target_key.in_(models))

    # of machines, workloads, setups and prompts those that rows about these models refer to
    for key, columns in LINKED.items():
        yield key.in_(union(*map(of_models, columns)))
    prompts = tables.prompts.c
    traced = union(*(of_models(table.c.prompt_digest) for table in tables.TRACES.values()))
    yield prompts.id.in_(
        union(of_models(tables.samples.c.prompt_id), select(prompts.id).where(prompts.digest.in_(traced)))
    )


def _insert(connection: Connection, table: Table, row: Values, children: Sequence[Values]) -> Any:
    """Inserts a row with its children, and of a policy its choices; returns the primary key."""
    [key] = connection.execute(insert(table).values(row)).inserted_primary_key or (None,)
    if children:
        child = CHILDREN[table.name]
        connection.execute(insert(child), [{**each, PARENTS[child.name]: key} for each in children])
    if table is tables.policies and (choices := tables.choice_rows(int(key or 0), row["policy"])):
        connection.execute(insert(tables.choices), choices)
    return key


@contextmanager
def _new_file(path: Path) -> Iterator[Connection]:
    """A new bundle with its tables; committed and closed on leaving."""
    engine = sqlalchemy.create_engine(URL.create("sqlite", database=str(path)))
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {int(migrations.HEAD)}")
            tables.metadata.create_all(connection)
            yield connection
    finally:
        engine.dispose()


# --- out of a file ---


def _checked_items(path: Path) -> Iterator[Item]:
    """The items of a bundle. Raises InputError, naming the file: one is not allowed."""

    def refuse(_: Table, error: InputError) -> None:
        raise error

    try:
        with _opened(path) as connection:
            yield from items(connection, refuse)
    except OSError as error:
        raise InputError(f"bundle {path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"bundle {path}: {error}") from error
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, ValueError) as error:  # ValueError: not UTF-8
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise InputError(f"bundle {path}: it is damaged: {reason}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Connection]:
    """A stranger's file: read-only, without its journal, with nothing but the tables of this schema in it."""
    with open_file(path) as file:
        first = file.read(100)
        size = os.fstat(file.fileno()).st_size
        content = first + file.read(MOST_BYTES) if size <= MOST_BYTES else b""
    if first.startswith(b"draftpick-bundle "):
        raise InputError("it is of draftpick 0.5 or older: merge it there, and pack that store with this draftpick")
    if not first.startswith(b"SQLite format 3\0") or int.from_bytes(first[68:72]) != APPLICATION_ID:
        raise InputError(f"it is not a bundle: `{command('bundle pack')}` makes one")
    if size > MOST_BYTES:
        raise InputError(f"it has {size} bytes: {MOST_BYTES} are allowed")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise InputError("it is damaged: its content does not have its checksum")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_VALUE_BYTES)
        for setting in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON", "mmap_size = 0"):
            connection.execute(f"PRAGMA {setting}")
        return connection

    engine = sqlalchemy.create_engine("sqlite://", creator=connect, json_deserializer=msgspec.json.decode)
    try:
        with engine.connect() as connection:
            _require_schema(connection)
            yield connection
    finally:
        engine.dispose()


def _require_schema(connection: Connection) -> None:
    schema = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if schema > int(migrations.HEAD):
        raise InputError(f"it has schema {schema:04}, this draftpick reads up to {migrations.HEAD}: upgrade draftpick")
    if strange := _schema(connection) ^ _expected_schema():
        kind, name, *_ = min(strange)
        raise InputError(f"its {kind} {name[:60]!r} is not of schema {migrations.HEAD}")
    for check in ("quick_check", "foreign_key_check"):
        result = connection.exec_driver_sql(f"PRAGMA {check}").fetchmany(1)
        if result and result[0][0] != "ok":
            raise InputError(f"it is damaged: {printable(' '.join(map(str, result[0])))[:100]}")


@cache
def _expected_schema() -> set[tuple[str, str, str, str]]:
    empty = sqlalchemy.create_engine("sqlite://")
    with empty.begin() as connection:
        tables.metadata.create_all(connection)
        return _schema(connection)


def _schema(connection: Connection) -> set[tuple[str, str, str, str]]:
    """Everything that is defined in a database, without white space."""
    master = sqlalchemy.table("sqlite_master", *map(sqlalchemy.column, ("type", "name", "tbl_name", "sql")))
    rows = connection.execute(select(master.c.type, master.c.name, master.c.tbl_name, master.c.sql))
    return {(str(kind), str(name), str(table), " ".join(str(sql).split())) for kind, name, table, sql in rows}
