"""Rows as a bundle may hold them: every value of its column's type, no path, every row through its record."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Connection, Float, Table, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from profiles.records.codec import from_builtins
from profiles.records.core import Environment, Model, Workload
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import InputError, require
from profiles.records.evidence import Infeasible, Sample
from store import tables
from store.tables import Row, Values
from tuner.bundle.sanitize import clean, require_no_path
from tuner.policy import policy as policies
from tuner.report.data import ReportData

# in this order, what a row refers to comes before it
SUBJECTS = (tables.models, tables.environments, tables.prompts, tables.workloads, tables.setups)
TABLES = (*SUBJECTS, tables.runs, *(table for table in tables.ABOUT_TARGETS if table is not tables.runs))
CHILDREN = {"sweeps": tables.step_times, "units": tables.samples}
PARENTS = {"step_times": "sweep_id", "samples": "unit_id"}  # the columns with the row that they belong to
TRACES = {table.name for table in tables.TRACES.values()}
HEX = re.compile(r"[0-9a-f]{16,128}")
UTC_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?\+00:00")
MOST_CHILDREN, LARGEST_GENERATION = 100_000, 10**6


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


def items(connection: Connection, refuse: Callable[[Table, InputError], None], *conditions: Any) -> Iterator[Item]:
    """Every row of a database as a checked item; those that are not allowed are passed to `refuse`.

    A row that refers to a refused row is refused too. `conditions` select rows, of the tables they are about.
    """
    accepted: dict[str, set[Any]] = {table.name: set() for table in TABLES}
    lengths: dict[tuple[str, ...], int] = {}  # of the target traces
    for table in TABLES:
        key = table.c[primary_key(table)]
        selected = [condition for condition in conditions if condition.left.table is table]
        for row_id in connection.scalars(select(key).where(*selected).order_by(key)).all():
            try:
                item = _item(connection, table, row_id)
                if item.row.get("run_id") not in accepted["runs"]:
                    item.row.update(dict.fromkeys({"run_id"} & item.row.keys()))  # of a run that has not ended
                _check_links(item, accepted)
                _check_length(item, lengths)
            except InputError as error:
                refuse(table, InputError(f"{table.name}: {error}"))
            else:
                accepted[table.name].add(item.id)
                yield item


def _item(connection: Connection, table: Table, row_id: Any) -> Item:
    """One row and its children. Raises InputError."""
    try:
        query = select(table).where(table.c[primary_key(table)] == row_id)
        row = _checked(table, connection.execute(query).mappings().one())
        children: tuple[Values, ...] = ()
        if (child := CHILDREN.get(table.name)) is not None:
            parent = PARENTS[child.name]
            query = select(child).where(child.c[parent] == row_id).order_by(*child.primary_key.columns)
            rows = connection.execute(query.limit(MOST_CHILDREN + 1)).mappings().all()
            require(0 < len(rows) <= MOST_CHILDREN, f"it has {len(rows)} rows: 1 to {MOST_CHILDREN} are allowed")
            children = tuple({**_checked(child, each), parent: row_id} for each in rows)
        return Item(table=table, row=_through_record(table, row, children), children=children)
    except DBAPIError:
        raise
    except (SQLAlchemyError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _check_links(item: Item, accepted: Mapping[str, set[Any]]) -> None:
    for row in (item.row, *item.children):
        for name, other in links(item.table if row is item.row else CHILDREN[item.table.name]).items():
            is_there = row[name] is None or other is item.table or row[name] in accepted[other.name]
            require(is_there, f"{name} {row[name]} refers to a row that is not there")


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


def _through_record(table: Table, row: Values, children: tuple[Values, ...]) -> Values:
    """The row as its record or document allows it. Raises InputError."""
    match table.name:
        case "models":
            _require_same(row, key=_record(Model, row).run_digest)
        case "environments":
            _require_same(row, digest=_record(Environment, row).digest)
            require_no_path(row["engine_options"])
        case "runs":
            return {**row, "outcome": _outcome(row)}
        case "sweeps":
            tables.step_times_records({**row, **child} for child in children)
        case "units":
            require([child["position"] for child in children] == list(range(len(children))), "a position is missing")
            for child in children:
                _record(Sample, {**child, "setup_digest": row["digest"], "prompt_digest": row["digest"]})
        case "policies":
            policy = policies.from_json(row["policy"])
            _require_same(row, target_key=policy.target.run_digest, environment_digest=policy.environment.digest)
            in_range = 0 <= row["generation"] <= LARGEST_GENERATION
            require(in_range, f"generation {row['generation']}: allowed are 0 to {LARGEST_GENERATION}")
            return {**row, "policy": policies.to_json(policy)}
        case name if name in _RECORDS:
            _record(_RECORDS[name], row)
    return row


def _record(kind: type[Any], row: Mapping[str, Any]) -> Any:
    return from_builtins(kind, {item.name: row[item.name] for item in fields(kind) if item.name in row}, kind.__name__)


def _require_same(row: Values, **computed: str) -> None:
    for name, value in computed.items():
        require(row[name] == value, f"{name} is {row[name]}, but the row's content has {value}")


def _outcome(row: Values) -> dict[str, Any]:
    from_builtins(Workload, row["workload"], "workload")
    outcome = row["outcome"] or {}
    require(isinstance(outcome, dict), "its outcome is a list: an object is needed")
    from_builtins(tuple[RefusedDraft, ...], outcome.get("left_out", []), "left_out")
    from_builtins(dict[str, float | dict[str, dict[str, float | None]] | None], outcome.get("cost", {}), "cost")
    if "dossier" in outcome:
        outcome = {**outcome, "dossier": ReportData.from_json(outcome["dossier"]).to_json()}
    return outcome


_RECORDS = {table.name: kind for kind, table in tables.TRACES.items()} | {"infeasible": Infeasible}
