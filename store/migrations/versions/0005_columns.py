"""Batch size, domain, draft, k and each choice become columns; timed runs are normalised, arrays packed; views.

The new tables stand in `0005_columns.sql`. Old rows go through today's records; what they do not say (a prompt's
domain) is null; a damaged row, which could not be read before either, is left out.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from alembic import op
from sqlalchemy import Column, Connection, Integer, String, Table, insert, inspect

from profiles.records.codec import from_builtins
from profiles.records.core import Setup, Workload, digest_of
from profiles.records.draft_spec import parse_draft
from profiles.records.evidence import AcceptanceTrace, LookupTrace, StepTimes, TargetTrace
from store import tables
from store.migrations import execute_script

revision = "0005"
down_revision = "0004"

OLD = ("target_traces", "acceptance_traces", "lookup_traces", "step_times", "samples", "infeasible", "runs", "policies")
DAMAGES = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
OLD_NAMES = {"accept_probs": "keep_probs", "accepted": "kept", "component_digest": "part_digest"}

Row = dict[str, Any]


def upgrade() -> None:
    connection = op.get_bind()
    op.add_column("models", Column("vocab_size", Integer))
    op.add_column("models", Column("stored_type", String))
    for name in OLD:  # copied, not renamed: names of constraints and indexes would be taken
        connection.exec_driver_sql(f"CREATE TABLE old_{name} AS SELECT * FROM {name}")
        op.drop_table(name)
    execute_script(connection, "0005_columns.sql")
    workloads = _workloads(connection)
    _insert(connection, tables.workloads, workloads.values())
    _insert(connection, tables.setups, _setups(connection))
    execute_script(connection, "0005_copy.sql")
    _copy(connection, tables.runs, _run)
    _copy_policies(connection)
    temperatures = {row["sampling_digest"]: row["temperature"] for row in workloads.values()}
    for kind, table in tables.TRACES.items():
        _copy_traces(connection, kind, table, temperatures)
    _insert(connection, tables.step_times, _step_times(connection))
    for name in OLD:
        op.drop_table(f"old_{name}")
    if connection.dialect.name != "sqlite":  # these rows came with their ids
        for name in ("runs", "policies", "target_traces", "acceptance_traces", "lookup_traces"):
            next_id = f"SELECT coalesce(max(id), 0) + 1 FROM {name}"
            connection.exec_driver_sql(f"SELECT setval('{name}_id_seq', ({next_id}), false)")


def _rows(connection: Connection, query: str) -> Iterator[Row]:
    return map(dict, connection.exec_driver_sql(query).mappings())


def _json(value: Any) -> Any:
    """SQLite gives JSON as text, PostgreSQL's driver as its values."""
    return json.loads(value) if isinstance(value, str) else value


def _insert(connection: Connection, table: Table, rows: Iterable[Row]) -> None:
    columns = {column["name"] for column in inspect(connection).get_columns(table.name)}  # of this revision
    rows = ({name: value for name, value in row.items() if name in columns} for row in rows)
    while chunk := list(islice(rows, 1000)):
        connection.execute(insert(table), chunk)


def _copy(connection: Connection, table: Table, convert: Callable[[Row], Row]) -> None:
    """Copy a table: what every row about a target has, and what `convert` makes of the rest."""
    about = ("id", "target_key", "environment_digest", tables.time_name(table.name))

    def converted() -> Iterator[Row]:
        for row in _rows(connection, f"SELECT * FROM old_{table.name} ORDER BY id"):
            with contextlib.suppress(*DAMAGES):
                yield {**{column: row[column] for column in about}, **convert(row)}

    _insert(connection, table, converted())


def _record(kind: type[Any], row: Row, *names: str, **values: Any) -> Any:
    """A record of JSON columns, which had other names."""
    columns = {name: _json(row[OLD_NAMES.get(name, name)]) for name in names}
    return from_builtins(kind, {**columns, **values}, kind.__name__)


def _run(row: Row) -> Row:
    outcome = _json(row["outcome"])
    columns = {"finished_at": row["finished_at"], "workload": _json(row["workload"]), "outcome": outcome}
    return {**columns, **tables.run_costs(outcome)}


def _copy_policies(connection: Connection) -> None:
    """Number the policies of each target and machine in the order in which they answered until now."""
    newest: dict[tuple[str, str], int] = {}
    generations, choices = {}, []
    for row in _rows(connection, "SELECT * FROM old_policies ORDER BY created_at, id"):
        key = (row["target_key"], row["environment_digest"])
        generations[row["id"]] = newest[key] = newest.get(key, 0) + 1
        choices += tables.choice_rows(row["id"], row["policy"])

    def policy(row: Row) -> Row:
        text = row["policy"]
        with contextlib.suppress(*DAMAGES):
            text = json.dumps(json.loads(text), allow_nan=False, separators=(",", ":"))
        return {"generation": generations[row["id"]], "policy": text}

    _copy(connection, tables.policies, policy)
    _insert(connection, tables.choices, choices)


def _copy_traces(connection: Connection, kind: type[Any], table: Table, temperatures: dict[str, float]) -> None:
    arrays: tuple[str, ...] = ("token_ids", "target_probs", "logit_gaps")
    if kind is not TargetTrace:
        arrays = ("accept_probs", "confidences") if kind is AcceptanceTrace else ("proposed", "accepted")
    more = {TargetTrace: ("ended",), AcceptanceTrace: ("draft_digest",), LookupTrace: ("draft_digest", "max_length")}

    def trace(row: Row) -> Row:
        plain = {name: row[name] for name in ("prompt_digest", *more[kind])}
        if kind is TargetTrace:
            plain["ended"] = bool(plain["ended"])
        record = _record(kind, row, *arrays, **plain)
        named = {} if kind is TargetTrace else {"draft_name": row["draft_name"]}
        digest = row["sampling_digest"]
        about = {"sampling_digest": digest, "temperature": temperatures.get(digest), **named}
        return {**about, **tables.trace_row(record)}

    _copy(connection, table, trace)


def _step_times(connection: Connection) -> Iterator[Row]:
    query = "SELECT sweeps.id AS sweep_id, old.* FROM old_step_times old JOIN sweeps ON sweeps.digest = old.sweep"
    for row in _rows(connection, query):
        with contextlib.suppress(*DAMAGES):
            plain = {name: row[name] for name in ("batch_size", "context_length")}
            plain |= {"component_digest": row["part_digest"], "disturbed": bool(row["disturbed"])}
            times = _record(StepTimes, row, "samples_s", **plain)
            yield from tables.step_times_rows(row["sweep_id"], times, row["part_name"])


def _workloads(connection: Connection) -> dict[str, Row]:
    """What each anchor's digest was made of, where a run tells; the context length is not part of it."""
    batch_sizes = [row["batch_size"] for row in _rows(connection, "SELECT DISTINCT batch_size FROM old_step_times")]
    timed = {}
    for row in _rows(connection, "SELECT workload FROM old_runs"):
        with contextlib.suppress(*DAMAGES):
            workload = _record(Workload, {}, **_json(row["workload"]))
            for batch_size in {1, workload.batch_size, *batch_sizes}:
                of_batch = replace(workload, batch_size=batch_size)
                timed[of_batch.timing_digest] = tables.workload_row(of_batch)
    query = "SELECT anchor_digest FROM old_samples UNION SELECT anchor_digest FROM old_infeasible"
    anchors = [row["anchor_digest"] for row in _rows(connection, query)]
    unknown = dict.fromkeys(tables.workloads.columns.keys()[1:])  # without the id
    return {
        anchor: {**unknown, "timing_digest": anchor, **timed.get(anchor, {})}
        | {"digest": digest_of([anchor, None]), "context_length": None}
        for anchor in anchors
    }


def _setups(connection: Connection) -> list[Row]:
    query = "SELECT DISTINCT setup_digest, setup_name FROM old_samples"
    setups = {row["setup_digest"]: _named_setup(row["setup_name"]) for row in _rows(connection, query)}
    for row in _rows(connection, "SELECT setup_digest, setup FROM old_infeasible"):
        with contextlib.suppress(*DAMAGES):
            setups[row["setup_digest"]] = tables.setup_row(from_builtins(Setup, _json(row["setup"]), "setup"))
    return [{**setup, "digest": digest} for digest, setup in setups.items()]


def _named_setup(name: str) -> Row:
    """A setup by its name, such as `draft-code k=4`."""
    draft, _, length = name.rpartition(" k=")
    setup = {"name": name, "draft": draft or None, "draft_kind": None, "k": 0}
    with contextlib.suppress(*DAMAGES):
        setup |= {"k": int(length.split()[0]), "draft_kind": parse_draft(draft).kind} if draft else {}
    return setup
