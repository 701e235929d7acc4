"""Batch size, domain, draft, k and each choice become columns; timed runs are normalised, arrays packed; views.

The new tables stand in `0005_columns.sql`. What old rows do not say (a prompt's domain) is null; a damaged row, which
could not be read before either, is left out. Rows are made by `store.tables`, as new ones are.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from alembic import op
from sqlalchemy import Column, Connection, Integer, String, Table, insert

from profiles.records.codec import from_builtins
from profiles.records.core import Workload, digest_of
from profiles.records.evidence import Acceptance, StepTimes
from store import tables
from store.migrations import execute_script

revision = "0005"
down_revision = "0004"

OLD = ("target_traces", "acceptance_traces", "lookup_traces", "step_times", "samples", "infeasible", "runs", "policies")
MOST_BATCH = 4096  # batch sizes that are tried to find what an anchor's digest was made of
DAMAGES = (LookupError, TypeError, ValueError, RecursionError)
SETUP_NAME = re.compile(r"(?P<draft>.+) k=(?P<k>\d+)(?: stop<\S+)?")

Row = dict[str, Any]
Workloads = dict[str, Workload]  # of finished and unfinished runs, by sampling digest


def upgrade() -> None:
    connection = op.get_bind()
    op.add_column("models", Column("vocab_size", Integer))
    op.add_column("models", Column("stored_type", String))
    for name in OLD:  # copied, not renamed: names of constraints and indexes would be taken
        connection.exec_driver_sql(f"CREATE TABLE old_{name} AS SELECT * FROM {name}")
        op.drop_table(name)
    execute_script(connection, "0005_columns.sql")
    workloads = _workloads(connection)
    _fill(connection, tables.workloads, _old_workloads(connection, workloads))
    _fill(connection, tables.setups, _setups(connection))
    execute_script(connection, "0005_copy.sql")
    _copy(connection, tables.runs, _run)
    _copy_policies(connection)
    _copy_traces(connection, workloads)
    _copy_step_times(connection)
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


def _fill(connection: Connection, table: Table, rows: Iterable[Row]) -> None:
    rows = iter(rows)
    while chunk := list(islice(rows, 1000)):
        connection.execute(insert(table), chunk)


def _copy(connection: Connection, table: Table, convert: Callable[[Row], Row]) -> None:
    """Copy a table: what every row about a target has, and what `convert` makes of the rest."""
    about = ("id", "target_key", "environment_digest", tables.time_name(table.name))

    def converted() -> Iterator[Row]:
        for row in _rows(connection, f"SELECT * FROM old_{table.name} ORDER BY id"):
            with contextlib.suppress(*DAMAGES):
                yield {**{name: row[name] for name in about}, **convert(row)}

    _fill(connection, table, converted())


def _run(row: Row) -> Row:
    outcome = _json(row["outcome"])
    costs = tables.run_costs(outcome)
    return {"finished_at": row["finished_at"], "workload": _json(row["workload"]), "outcome": outcome, **costs}


def _copy_policies(connection: Connection) -> None:
    """Number the policies of each target and machine in the order in which they answered until now."""
    newest: dict[tuple[str, str], int] = {}
    generations = {}
    for row in _rows(connection, "SELECT * FROM old_policies ORDER BY created_at, id"):
        key = (row["target_key"], row["environment_digest"])
        generations[row["id"]] = newest[key] = newest.get(key, 0) + 1

    def policy(row: Row) -> Row:
        return {"generation": generations[row["id"]], "policy": tables.policy_text(row["policy"])}

    _copy(connection, tables.policies, policy)
    for row in _rows(connection, "SELECT id, policy FROM policies ORDER BY id"):
        _fill(connection, tables.choices, tables.choice_rows(row["id"], row["policy"]))


def _workloads(connection: Connection) -> Workloads:
    workloads = {}
    for row in _rows(connection, "SELECT workload FROM old_runs"):
        with contextlib.suppress(*DAMAGES):
            workload = from_builtins(Workload, _json(row["workload"]), "workload")
            workloads[workload.sampling_digest] = workload
    return workloads


def _copy_traces(connection: Connection, workloads: Workloads) -> None:
    def trace(row: Row, *arrays: str) -> Row:
        workload = workloads.get(row["sampling_digest"])
        keys = {name: row[name] for name in ("sampling_digest", "prompt_digest")}
        packed = {name: tuple(_json(row[name])) for name in arrays}
        return {**keys, **packed, "temperature": workload and workload.temperature}

    def target_trace(row: Row) -> Row:
        return {**trace(row, "token_ids", "target_probs", "logit_gaps"), "ended": bool(row["ended"])}

    def acceptance_trace(row: Row) -> Row:
        arrays = trace(row, "keep_probs", "confidences")
        return drafted(row, tables.acceptance_record({**row, **arrays, "accept_probs": arrays["keep_probs"]}))

    def lookup_trace(row: Row) -> Row:
        arrays = trace(row, "proposed", "kept")
        return drafted(row, tables.lookup_record({**row, **arrays, "accepted": arrays["kept"]}))

    def drafted(row: Row, record: Acceptance) -> Row:
        return {**trace(row), "draft_name": row["draft_name"], **tables.acceptance_row(record)}

    _copy(connection, tables.target_traces, target_trace)
    _copy(connection, tables.acceptance_traces, acceptance_trace)
    _copy(connection, tables.lookup_traces, lookup_trace)


def _copy_step_times(connection: Connection) -> None:
    def rows() -> Iterator[Row]:
        query = "SELECT sweeps.id AS sweep_id, old.* FROM old_step_times old JOIN sweeps ON sweeps.digest = old.sweep"
        for row in _rows(connection, query):
            with contextlib.suppress(*DAMAGES):
                times = StepTimes(
                    component_digest=row["part_digest"],
                    batch_size=row["batch_size"],
                    context_length=row["context_length"],
                    samples_s={width: tuple(seconds) for width, seconds in _json(row["samples_s"])},
                    disturbed=bool(row["disturbed"]),
                )
                yield from tables.step_times_rows(row["sweep_id"], times, row["part_name"])

    _fill(connection, tables.step_times, rows())


def _old_workloads(connection: Connection, workloads: Workloads) -> Iterator[Row]:
    """What each anchor's digest was made of; the context length is not part of it."""
    samplings = {row["sampling_digest"] for row in _rows(connection, "SELECT sampling_digest FROM old_target_traces")}
    tried = {
        digest_of([sampling, batch_size]): (sampling, batch_size)
        for sampling in samplings | workloads.keys()
        for batch_size in range(1, MOST_BATCH + 1)
    }
    query = "SELECT anchor_digest FROM old_samples UNION SELECT anchor_digest FROM old_infeasible"
    for row in _rows(connection, query):
        anchor = row["anchor_digest"]
        sampling, batch_size = tried.get(anchor, (None, None))
        workload = workloads.get(sampling) if sampling is not None else None
        named = {} if workload is None else tables.workload_row(workload)
        unknown = dict.fromkeys(("max_new_tokens", "temperature", "top_p", "top_k", "seed"))
        yield {
            **{name: named.get(name) for name in unknown},
            "digest": tables.workload_digest(anchor, None),
            "timing_digest": anchor,
            "sampling_digest": sampling,
            "batch_size": batch_size,
            "context_length": None,
        }


def _setups(connection: Connection) -> list[Row]:
    query = "SELECT DISTINCT setup_digest, setup_name FROM old_samples"
    setups = {row["setup_digest"]: _named_setup(row["setup_name"]) for row in _rows(connection, query)}
    for row in _rows(connection, "SELECT setup_digest, setup FROM old_infeasible"):
        with contextlib.suppress(*DAMAGES):
            setups[row["setup_digest"]] = tables.setup_row(tables.setup_from(_json(row["setup"])))
    return [{**setup, "digest": digest} for digest, setup in setups.items()]


def _named_setup(name: str) -> Row:
    """A setup by its name: of a draft with a path in its name, too."""
    match = SETUP_NAME.fullmatch(name)
    if match is None:
        return {"name": name, "draft": None, "draft_kind": None, "k": 0}
    draft = match["draft"]
    kinds = {"ngram:": "composite" if "+" in draft else "ngram", "early-exit:": "early_exit", "native:": "native"}
    kind = next((kind for start, kind in kinds.items() if draft.startswith(start)), "model")
    return {"name": name, "draft": draft, "draft_kind": kind, "k": int(match["k"])}
