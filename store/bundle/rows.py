"""Rows as a bundle may hold them: every value of its column's type, no path, every row through its record."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Connection, Float, Table, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from profiles.records.codec import from_builtins
from profiles.records.core import Environment, Model, Workload, digest_of
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import InputError, require
from profiles.records.evidence import Infeasible, Sample
from profiles.records.keys import queue_digest
from store import tables
from store.bundle.sanitize import clean
from store.tables import Row, Values

# in this order, what a row refers to comes before it
SUBJECTS = (tables.models, tables.environments, tables.prompts, tables.workloads, tables.setups)
TABLES = (*SUBJECTS, tables.runs, *(table for table in tables.ABOUT_TARGETS if table is not tables.runs))
CHILDREN = {"sweeps": tables.step_times, "units": tables.samples}
PARENTS = {"step_times": "sweep_id", "samples": "unit_id"}  # the columns with the row that they belong to
TRACES = {table.name for table in tables.TRACES.values()}
HEX = re.compile(r"[0-9a-f]{16,128}")
UTC_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?\+00:00")
MOST_CHILDREN, LARGEST_SIZE, LARGEST_GENERATION = 100_000, 2**24, 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The checks of JSON documents that belong to layers above the store.

    `policy` returns a policy's text normalised, and the digests of its target and machine; `report_data` returns
    a run's report data. Both raise InputError.
    """

    policy: Callable[[str], tuple[str, str, str]]
    report_data: Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row with the rows that belong to it (the samples of a unit, the widths of a sweep), checked and cleaned."""

    table: Table
    row: Values
    children: tuple[Values, ...] = ()

    @property
    def id(self) -> Any:
        return self.row[primary_key(self.table)]


def primary_key(table: Table) -> str:
    [column] = table.primary_key.columns
    return column.name


def links(table: Table) -> dict[str, Table]:
    """The columns that refer to a row of another table."""
    return {column.name: key.column.table for column in table.c for key in column.foreign_keys}


def items(
    connection: Connection,
    documents: Documents,
    refuse: Callable[[Table, InputError], None],
    *conditions: Any,
    digests: dict[str, str] | None = None,
) -> Iterator[Item]:
    """Every row of a database as a checked item; those that are not allowed are passed to `refuse`.

    A row that refers to a refused row is refused too.

    Args:
        conditions: select rows, of the tables they are about.
        digests: filled with the new digest of each machine that has another one without the paths and secrets in its
            engine options; its rows get that digest. None: such a machine is not allowed.
    """
    accepted: dict[str, set[Any]] = {table.name: set() for table in TABLES}
    lengths: dict[tuple[str, ...], int] = {}  # of the target traces
    for table in TABLES:
        key = table.c[primary_key(table)]
        selected = [condition for condition in conditions if condition.left.table is table]
        for row_id in connection.scalars(select(key).where(*selected).order_by(key)).all():
            try:
                item = _item(connection, table, row_id, documents, digests=digests)
                if item.row.get("run_id") not in accepted["runs"]:
                    item.row.update(dict.fromkeys({"run_id"} & item.row.keys()))  # of a run that has not ended
                for row in (item.row, *item.children):
                    for name, other in links(table if row is item.row else CHILDREN[table.name]).items():
                        is_there = row[name] is None or other is table or row[name] in accepted[other.name]
                        require(is_there, f"{name} {row[name]} refers to a row that is not there")
                _check_length(item, lengths)
            except InputError as error:
                refuse(table, InputError(f"{table.name}: {error}"))
                continue
            if item.id not in accepted[table.name]:  # two machines can be one without their paths
                accepted[table.name].add(item.id)
                yield item


def _item(
    connection: Connection, table: Table, row_id: Any, documents: Documents, *, digests: dict[str, str] | None
) -> Item:
    """One row and its children. Raises InputError."""
    try:
        query = select(table).where(table.c[primary_key(table)] == row_id)
        stored = connection.execute(query).mappings().one()
        row = _checked(table, stored)
        if digests is not None:
            row = _with_digests(table, stored, row, digests)
        child = CHILDREN.get(table.name)
        children: tuple[Values, ...] = ()
        if child is not None:
            parent = PARENTS[child.name]
            query = select(child).where(child.c[parent] == row_id).order_by(*child.primary_key.columns)
            rows = connection.execute(query.limit(MOST_CHILDREN + 1)).mappings().all()
            require(0 < len(rows) <= MOST_CHILDREN, f"it has {len(rows)} rows: 1 to {MOST_CHILDREN} are allowed")
            children = tuple({**_checked(child, each), parent: row_id} for each in rows)
        if table is tables.units and digests is None:
            row = row | {"digest": _unit_digest(connection, row)}
        if table.name in _RECORDS:
            _record(_RECORDS[table.name], row)
        if check := _CHECKS.get(table.name):
            row = check(row, children, documents)
        return Item(table=table, row=row, children=children)
    except DBAPIError:
        raise
    except (SQLAlchemyError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


# --- the columns ---


def _checked(table: Table, row: Row) -> Values:
    """The columns of a table, each of its type, their text cleaned."""
    values = {column.name: row[column] for column in table.columns}
    for column in table.columns:
        if values[column.name] is None:
            require(column.nullable is True, f"{column.name} is null")
        else:
            _check_value(column, values[column.name])
    if table is tables.policies:
        values["policy"] = json.dumps(clean(json.loads(values["policy"])))
    return {name: value if name == "policy" else clean(value, name) for name, value in values.items()}


def _check_value(column: Column[Any], value: Any) -> None:
    name, kind = column.name, column.type
    if isinstance(kind, tables.Numbers):
        require(all(map(math.isfinite, value)), f"{name} holds a number that is not finite")
        return
    allowed = (list, dict) if isinstance(kind, JSON) else (int, float) if isinstance(kind, Float) else kind.python_type
    good = isinstance(value, allowed) and isinstance(value, bool) == isinstance(kind, Boolean)
    require(good, f"{name} is {type(value).__name__}: {kind} is needed")
    if isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}: a finite number is needed")
    elif isinstance(value, int) and name not in ("num_params", "memory_bytes", "memory_bandwidth_bytes_s", "seed"):
        require(abs(value) < 2**31, f"{name} is {value}: less than 2**31 is needed")
    elif name in ("key", "digest", "target_key") or name.endswith("_digest"):
        require(HEX.fullmatch(value) is not None, f"{name} is {value[:60]!r}: a digest is needed")
    elif name.endswith("_at"):
        require(UTC_TIME.fullmatch(value) is not None, f"{name} is {value[:60]!r}: a UTC time is needed")


# --- the records ---


def _record(kind: type[Any], row: Mapping[str, Any]) -> Any:
    return from_builtins(kind, {item.name: row[item.name] for item in fields(kind) if item.name in row}, kind.__name__)


def _require_same(row: Values, **computed: str) -> Values:
    for name, value in computed.items():
        require(row[name] == value, f"{name} is {row[name]}, but the row's content has {value}")
    return row


def _model(row: Values, *_: Any) -> Values:
    return _require_same(row, key=_record(Model, row).run_digest)


def _environment(row: Values, *_: Any) -> Values:
    return _require_same(row, digest=_record(Environment, row).digest)


def _with_digests(table: Table, stored: Row, row: Values, digests: dict[str, str]) -> Values:
    """The cleaned row with the digest that its machine has after cleaning."""
    if table is tables.environments and _record(Environment, stored).digest == stored["digest"]:
        digests[row["digest"]] = _record(Environment, row).digest
    names = {"digest"} if table is tables.environments else {"environment_digest"} & row.keys()
    return row | {name: digests.get(row[name], row[name]) for name in names}


def _sweep(row: Values, children: Sequence[Values], _: Documents) -> Values:
    sizes = [row[name] for name in ("batch_size", "context_length", "max_length")]
    require(min(sizes) >= 0 and max(sizes) <= LARGEST_SIZE, f"sizes {sizes}: allowed are 0 to {LARGEST_SIZE}")
    tables.step_times_records({**row, **child} for child in children)
    return row


def _unit(row: Values, children: Sequence[Values], _: Documents) -> Values:
    require([child["position"] for child in children] == list(range(len(children))), "a position is missing")
    for child in children:
        _record(Sample, {**child, "setup_digest": row["digest"], "prompt_digest": row["digest"]})
    return row


def _unit_digest(connection: Connection, row: Values) -> str:
    """The digest under which the unit's machine finds it: another than the packed one where that was made up, or where
    the machine was packed without a path.

    A unit runs every setup on every prompt, and both may repeat: where samples can be those of two units, the packed
    digest stays.
    """
    query = select(tables.setups.c.digest, tables.prompts.c.digest).select_from(tables.samples)
    query = query.join(tables.setups).join(tables.prompts).where(tables.samples.c.unit_id == row["id"])
    pairs = [tuple(pair) for pair in connection.execute(query.order_by(tables.samples.c.position))]
    workloads = tables.workloads.c
    timing_digest = connection.scalar(select(workloads.timing_digest).where(workloads.id == row["workload_id"]))
    digests = []
    for num_prompts in range(1, len(pairs) + 1):
        setups, queue = [setup for setup, _ in pairs[::num_prompts]], [prompt for _, prompt in pairs[:num_prompts]]
        if len(pairs) % num_prompts == 0 and pairs == list(itertools.product(setups, queue)):
            point = (timing_digest, queue_digest(queue), row["purpose"], *setups)
            digests.append(digest_of([row["target_key"], row["environment_digest"], *point]))
    return str(row["digest"]) if row["digest"] in digests or len(digests) != 1 else digests[0]


def _run(row: Values, _: Any, documents: Documents) -> Values:
    from_builtins(Workload, row["workload"], "workload")
    outcome = row["outcome"] or {}
    require(isinstance(outcome, dict), "its outcome is a list: an object is needed")
    from_builtins(tuple[RefusedDraft, ...], outcome.get("left_out", []), "left_out")
    from_builtins(dict[str, float | dict[str, dict[str, float | None]] | None], outcome.get("cost", {}), "cost")
    if "dossier" in outcome:
        outcome = {**outcome, "dossier": documents.report_data(outcome["dossier"])}
    return {**row, "outcome": outcome}


def _policy(row: Values, _: Any, documents: Documents) -> Values:
    text, target_key, environment_digest = documents.policy(row["policy"])
    _require_same(row, target_key=target_key, environment_digest=environment_digest)
    in_range = 0 <= row["generation"] <= LARGEST_GENERATION
    require(in_range, f"generation {row['generation']}: allowed are 0 to {LARGEST_GENERATION}")
    return {**row, "policy": text}


def _check_length(item: Item, lengths: dict[tuple[str, ...], int]) -> None:
    """Raises InputError: acceptance without its target trace, or of another length."""
    if item.table.name not in TRACES:
        return
    trace = trace_key(item.row)
    column = {tables.target_traces: "token_ids", tables.acceptance_traces: "accept_probs"}.get(item.table, "accepted")
    size = len(item.row[column])
    if item.table is tables.target_traces:
        lengths[trace] = size
    require(lengths.get(trace) == size, f"{size} positions over a target trace of {lengths.get(trace, 0)} tokens")


def trace_key(row: Row) -> tuple[str, ...]:
    return row["target_key"], row["sampling_digest"], row["prompt_digest"]


_RECORDS = {table.name: kind for kind, table in tables.TRACES.items()} | {"infeasible": Infeasible}
_CHECKS: Mapping[str, Callable[..., Values]] = {
    "models": _model,
    "environments": _environment,
    "runs": _run,
    "sweeps": _sweep,
    "units": _unit,
    "policies": _policy,
}
