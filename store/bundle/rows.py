"""Rows as a bundle carries them: every column's type and every digest checked, every row through its record.

A checked row is in its one form, cleaned of paths, so that equal rows are equal values. Written over the columns of
`store.tables`: what a later schema adds comes along. How a bundle is kept in a file it must not know.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, Integer, Table, UniqueConstraint

from profiles.records.codec import decode, plain, sample_from, step_times_from
from profiles.records.core import Environment, Model, Workload, digest_of
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import InputError
from profiles.records.evidence import AcceptanceTrace, Infeasible, LookupTrace, Sample, StepTimes, TargetTrace
from store import tables
from store.bundle.sanitize import clean
from store.tables import Row
from tuner.policy import policy as policies
from tuner.report.data import ReportData

Values = dict[str, Any]

TABLES = {table.name: table for table in (tables.models, tables.environments, *tables.ABOUT_TARGETS)}
TRACES = ("target_traces", "acceptance_traces", "lookup_traces")
# rows that are one unit, by the columns that name it and those that all its rows share
UNITS = {
    "step_times": ("sweep", ("target_key", "environment_digest", "batch_size", "context_length", "max_length")),
    "samples": ("unit", ("target_key", "environment_digest", "anchor_digest", "occasion")),
}
HEX = re.compile(r"[0-9a-f]{16,128}")
UTC_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?\+00:00")
CLOCKS_DIFFER = timedelta(days=1)
LARGEST_SIZE = 2**24


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def columns_of(table: Table) -> list[Column[Any]]:
    """The columns a bundle carries: all but the number a row has in its own store."""
    return [column for column in table.columns if column.name != "id"]


def time_of(table: Table, row: Row) -> str:
    """When a row was made; empty for a model or a machine, which have no time."""
    return str(row[tables.time_name(table.name)]) if "target_key" in table.c else ""


def names_of(table: Table) -> tuple[str, ...]:
    """The columns that identify evidence; none for what has nothing but its whole content."""
    if "target_key" not in table.c:
        return tuple(column.name for column in table.primary_key)
    unique = [constraint for constraint in table.constraints if isinstance(constraint, UniqueConstraint)]
    return tuple(column.name for constraint in unique for column in constraint.columns)


def place_of(table: Table, row: Row) -> tuple[Any, ...]:
    """Where a row stands in a bundle: by table, by time, and what came first in its unit."""
    own = [row[name] for name in names_of(table)]
    content = "" if own else json.dumps(row, sort_keys=True)
    return (list(TABLES).index(table.name), time_of(table, row), *own, content)


def unit_of(table: Table, row: Row) -> tuple[Any, ...]:
    """What rows of one unit share; a row without a unit is alone."""
    place = place_of(table, row)
    return (*place[:2], row[UNITS[table.name][0]]) if table.name in UNITS else place


def from_store(table: Table, stored: Row) -> Values:
    """A stored row as a bundle carries it. Raises InputError: it is damaged, or larger than a bundle may carry."""
    row = {column.name: stored[column.name] for column in columns_of(table)}
    if table is tables.policies:
        _require(isinstance(row["policy"], str), "a policy is no text")
        row["policy"] = json.loads(policies.to_json(policies.from_json(row["policy"])))
    return checked(table, row)


def to_store(table: Table, row: Row) -> Values:
    """A checked row as the store keeps it."""
    return {**row, "policy": policies.to_json(_policy(row))} if table is tables.policies else dict(row)


def checked(table: Table, raw: object) -> Values:
    """A row from anywhere in its one form. Raises InputError, naming the table, the column and what is allowed."""
    _require(isinstance(raw, dict), f"{table.name}: a row is {type(raw).__name__}: an object is needed")
    assert isinstance(raw, dict)
    try:
        row = _filled(table, raw)
        for column in columns_of(table):
            _check_column(column, row[column.name])
        row = clean(row)
        return {**row, **CHECKS[table.name](row)}
    except (InputError, RecursionError) as error:
        raise InputError(f"{table.name}: {error}") from error


def _filled(table: Table, raw: Values) -> Values:
    """With the defaults of columns that an older schema did not have."""
    known = {column.name: column for column in columns_of(table)}
    for name in raw:
        _require(name in known, f"the unknown column {name[:60]!r}")
    return {name: raw[name] if name in raw else _default(column) for name, column in known.items()}


def _default(column: Column[Any]) -> Any:
    if column.server_default is not None:
        return json.loads(str(getattr(column.server_default, "arg", "null")))
    _require(column.nullable is True, f"it lacks the column {column.name!r}")
    return None


def _check_column(column: Column[Any], value: object) -> None:
    if value is None:
        _require(column.nullable is True, f"{column.name} is null")
        return
    kind = column.type
    allowed: tuple[type, ...] = (str,)
    if column.name == "policy":
        allowed = (dict,)
    elif isinstance(kind, JSON):
        allowed = (list, dict)
    elif isinstance(kind, Boolean):
        allowed = (bool,)
    elif isinstance(kind, Integer):
        allowed = (int,)
    elif isinstance(kind, Float):
        allowed = (int, float)
    good = isinstance(value, allowed) and isinstance(value, bool) == isinstance(kind, Boolean)
    _require(good, f"{column.name} is {type(value).__name__}: {' or '.join(one.__name__ for one in allowed)} is needed")
    if isinstance(value, int):
        bits = 63 if kind is tables.WIDE else 31
        _require(abs(value) < 2**bits, f"{column.name} is {value}: less than 2**{bits} is needed")
    if column.name.endswith("_digest") or column.name in ("key", "digest", "target_key", "unit", "sweep"):
        _require(HEX.fullmatch(str(value)) is not None, f"{column.name} is {str(value)[:60]!r}: a digest is needed")
    if column.name.endswith("_at"):
        _check_time(column.name, str(value))


def _check_time(name: str, value: str) -> None:
    allowed = "a UTC time like 2026-01-31T12:00:00.000000+00:00 is needed"
    _require(UTC_TIME.fullmatch(value) is not None, f"{name} is {value[:60]!r}: {allowed}")
    try:
        then = datetime.fromisoformat(value)
    except ValueError as error:
        raise InputError(f"{name} is {value!r}: {allowed}") from error
    _require(then < datetime.now(UTC) + CLOCKS_DIFFER, f"{name} is {value}, in the future: a clock was wrong")


# --- what each table's record says of a row: the fields in their one form ---


def _fields(record: type[Any], row: Row) -> Values:
    return {name: row[tables.column_name(name)] for name in record.__dataclass_fields__}  # type: ignore


def _same(name: str, stated: object, computed: str) -> None:
    _require(stated == computed, f"{name} is {stated}, but what the row holds has {computed}")


def _model(row: Row) -> Values:
    model: Model = decode(Model, _fields(Model, row), "model")
    _same("key", row["key"], model.run_digest)
    return plain(model)  # type: ignore[no-any-return]


def _environment(row: Row) -> Values:
    environment: Environment = decode(Environment, _fields(Environment, row), "environment")
    _same("digest", row["digest"], environment.digest)
    return plain(environment)  # type: ignore[no-any-return]


def _trace(record: type[Any]) -> Callable[[Row], Values]:
    def check(row: Row) -> Values:
        return tables.columns_from(decode(record, _fields(record, row), "trace"))  # type: ignore

    return check


def _counts(raw: object, size: int, name: str) -> list[list[int]]:
    """`[key parts..., value]` entries of whole numbers, no key twice."""
    entries: tuple[tuple[int, ...], ...] = decode(tuple[tuple[int, ...], ...], raw, name)
    _require(all(len(entry) == size for entry in entries), f"{name} has entries that are not of {size} numbers")
    _require(len({entry[:-1] for entry in entries}) == len(entries), f"{name} counts something twice")
    return [list(entry) for entry in entries]


def _step_times(row: Row) -> Values:
    entries = row["samples_s"]
    good = isinstance(entries, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in entries)
    _require(good, "samples_s has entries that are not of a width and its seconds")
    samples = [
        [decode(int, width, "width"), decode(tuple[float, ...], seconds, "samples_s")] for width, seconds in entries
    ]
    _require(len({width for width, _ in samples}) == len(samples), "samples_s has a width twice")
    sizes = [row[name] for name in ("batch_size", "context_length", "max_length")]
    _require(min(sizes) >= 0 and max(sizes) <= LARGEST_SIZE, f"sizes {sizes}: allowed are 0 to {LARGEST_SIZE}")
    return tables.columns_from(step_times_from({**_fields(StepTimes, row), "samples_s": samples}))  # type: ignore


def _sample(row: Row) -> Values:
    counted = {"rounds": _counts(row["rounds"], 3, "rounds"), "shapes": _counts(row["shapes"], 4, "shapes")}
    seconds = {name: float(row[name]) for name in ("ttft_s", "decode_s")}
    return plain(sample_from({**_fields(Sample, row), **counted, **seconds}))  # type: ignore[no-any-return]


def _infeasible(row: Row) -> Values:
    found: Infeasible = decode(Infeasible, _fields(Infeasible, row), "infeasible")
    _same("setup_digest", row["setup_digest"], found.setup.digest)
    return plain(found)  # type: ignore[no-any-return]


def _run(row: Row) -> Values:
    workload: Workload = decode(Workload, row["workload"], "workload")
    outcome = row["outcome"] or {}
    _require(row["finished_at"] is not None, "it is not finished")
    _require(row["started_at"] <= row["finished_at"], "it finished before it started")
    _require(isinstance(outcome, dict), "its outcome is a list: an object is needed")
    found = dict(outcome)
    if "left_out" in found:
        found["left_out"] = plain(decode(tuple[RefusedDraft, ...], found["left_out"], "left_out"))
    if "cost" in found:
        _require(isinstance(found["cost"], dict), "its cost is no object")
        numbers = all(value is None or isinstance(value, int | float) for value in found["cost"].values())
        _require(numbers, "its cost is no object of numbers")
    if "dossier" in found:
        found["dossier"] = ReportData.from_json(found["dossier"]).to_json()
    return {"workload": plain(workload), "outcome": found}


def _policy(row: Row) -> policies.Policy:
    return policies.from_json(json.dumps(row["policy"]))


def _policy_row(row: Row) -> Values:
    policy = _policy(row)
    _same("target_key", row["target_key"], policy.target.run_digest)
    _same("environment_digest", row["environment_digest"], policy.environment.digest)
    return {"policy": json.loads(policies.to_json(policy))}


CHECKS: Mapping[str, Callable[[Row], Values]] = {
    "models": _model,
    "environments": _environment,
    "target_traces": _trace(TargetTrace),
    "acceptance_traces": _trace(AcceptanceTrace),
    "lookup_traces": _trace(LookupTrace),
    "step_times": _step_times,
    "samples": _sample,
    "infeasible": _infeasible,
    "runs": _run,
    "policies": _policy_row,
}


def check_unit(table: Table, rows: list[Values]) -> None:
    """Raises InputError: rows of a unit that do not belong together, or whose unit's digest is another's."""
    name, shared = UNITS[table.name]
    for column in shared:
        _require(all(row[column] == rows[0][column] for row in rows), f"{table.name}: {name} with two of {column}")
    if table is tables.samples:
        _require(
            [row["position"] for row in rows] == list(range(len(rows))), f"samples: {name} with a position missing"
        )
        _require(rows[0]["unit"] in _unit_digests(rows), f"samples: {name} {rows[0]['unit']} is not what its rows say")


def _unit_digests(rows: list[Values]) -> set[str]:
    """What the unit of these rows may be called: setups by prompts in order, as `profiles.records.keys` does."""
    asked = [(row["setup_digest"], row["prompt_digest"]) for row in rows]
    found = set()
    for size in (
        size for size in range(1, len(asked) + 1) if len(asked) % size == 0
    ):  # of prompts per setup; one that is asked twice leaves more than one reading
        setups, prompts = [setup for setup, _ in asked[::size]], [prompt for _, prompt in asked[:size]]
        if asked == list(itertools.product(setups, prompts)):
            queue = prompts[0] if size == 1 else digest_of(prompts)
            about = [rows[0][name] for name in ("target_key", "environment_digest", "anchor_digest")]
            found.add(digest_of([*about, queue, rows[0]["occasion"], *setups]))
    return found
