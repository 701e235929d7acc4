"""Batch size, domain, draft, k and each choice become columns; timed runs are normalised, arrays packed; views.

The new tables stand in `0005_columns.sql`. What old rows do not say (a prompt's domain) is null; a damaged row, which
could not be read before either, is left out. Nothing of today's tables and records is used but `digest_of`, so that a
later change of them leaves this revision as it is.
"""

import contextlib
import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

from alembic import op
from sqlalchemy import JSON, Column, Connection, Integer, MetaData, String, Table, insert

from profiles.records.core import digest_of
from profiles.records.errors import require
from store.migrations import execute_script

revision = "0005"
down_revision = "0004"

OLD = ("target_traces", "acceptance_traces", "lookup_traces", "step_times", "samples", "infeasible", "runs", "policies")
TIMES = {"runs": "started_at", "policies": "created_at"}  # of the other tables `measured_at`
MOST_BATCH = 4096  # batch sizes that are tried to find what an anchor's digest was made of
DAMAGES = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
SETUP_NAME = re.compile(r"(?P<draft>.+) k=(?P<k>\d+)(?: stop<\S+)?")
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
COSTS = (
    "measured_seconds", "grid_seconds_estimate", "starting_seconds", "measured_units", "reused_units", "engine_starts"
)  # fmt: skip

Row = dict[str, Any]
Workloads = dict[str, Row]  # of finished and unfinished runs, by sampling digest


def upgrade() -> None:
    connection = op.get_bind()
    op.add_column("models", Column("vocab_size", Integer))
    op.add_column("models", Column("stored_type", String))
    for name in OLD:  # copied, not renamed: names of constraints and indexes would be taken
        connection.exec_driver_sql(f"CREATE TABLE old_{name} AS SELECT * FROM {name}")
        op.drop_table(name)
    execute_script(connection, "0005_columns.sql")
    workloads = _workloads(connection)
    _fill(connection, "workloads", _old_workloads(connection, workloads))
    _fill(connection, "setups", _setups(connection))
    execute_script(connection, "0005_copy.sql")
    _copy(connection, "runs", _run)
    _copy_policies(connection)
    _copy_traces(connection, workloads)
    _fill(connection, "step_times", _step_times(connection))
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


def _fill(connection: Connection, name: str, rows: Iterable[Row]) -> None:
    table = Table(name, MetaData(), autoload_with=connection, resolve_fks=False)
    for column in table.c:
        if isinstance(column.type, JSON):
            column.type.none_as_null = True
    rows = iter(rows)
    while chunk := list(islice(rows, 1000)):
        connection.execute(insert(table), chunk)


def _copy(connection: Connection, name: str, convert: Callable[[Row], Row]) -> None:
    """Copy a table: what every row about a target has, and what `convert` makes of the rest."""
    about = ("id", "target_key", "environment_digest", TIMES.get(name, "measured_at"))

    def converted() -> Iterator[Row]:
        for row in _rows(connection, f"SELECT * FROM old_{name} ORDER BY id"):
            with contextlib.suppress(*DAMAGES):
                yield {**{column: row[column] for column in about}, **convert(row)}

    _fill(connection, name, converted())


def _packed(values: list[Any]) -> bytes:
    """A byte that names the smallest type of `array` that holds all values exactly, then little-endian values."""
    require(all(map(math.isfinite, values)), "not finite")
    if all(value in (0, 1) for value in values):
        values = list(map(int, values))
    for code in "bhiqfd":
        with contextlib.suppress(OverflowError, TypeError):
            packed = array(code, values)
            if packed.tolist() == values:
                if sys.byteorder == "big":
                    packed.byteswap()
                return code.encode() + packed.tobytes()
    raise ValueError("no numbers")


def _run(row: Row) -> Row:
    outcome = _json(row["outcome"])
    costs = outcome.get("cost") if isinstance(outcome, dict) else None
    columns = {name: costs.get(name) if isinstance(costs, dict) else None for name in COSTS}
    return {"finished_at": row["finished_at"], "workload": _json(row["workload"]), "outcome": outcome, **columns}


def _copy_policies(connection: Connection) -> None:
    """Number the policies of each target and machine in the order in which they answered until now."""
    newest: dict[tuple[str, str], int] = {}
    generations = {}
    for row in _rows(connection, "SELECT * FROM old_policies ORDER BY created_at, id"):
        key = (row["target_key"], row["environment_digest"])
        generations[row["id"]] = newest[key] = newest.get(key, 0) + 1

    def policy(row: Row) -> Row:
        text = row["policy"]
        with contextlib.suppress(*DAMAGES):
            text = json.dumps(json.loads(text), allow_nan=False, separators=(",", ":"))
        return {"generation": generations[row["id"]], "policy": text}

    def choices() -> Iterator[Row]:
        for row in _rows(connection, "SELECT id, policy FROM policies ORDER BY id"):
            with contextlib.suppress(*DAMAGES):
                rows = list(map(_choice, json.loads(row["policy"])["choices"]))
                yield from ({"policy_id": row["id"], "position": i, **choice} for i, choice in enumerate(rows))

    _copy(connection, "policies", policy)
    _fill(connection, "choices", choices())


def _choice(choice: Row) -> Row:
    """The columns of a policy's choice, of which `basis` says what its figures are."""
    setup, measured = _setup(choice["setup"]), choice["measured"] or {}
    bases = [name for name in ("measured", "forecast") if (choice[name] or {}).get("setup") == choice["setup"]]
    figures = choice[bases[0]] if bases else {}
    is_plain = setup["draft"] is None
    speedup = figures.get("speedup") or {"estimate": 1.0 if is_plain else None}
    plain = measured.get("plain_tok_per_s")
    rates = {"tok_per_s": plain if is_plain else figures.get("tok_per_s"), "plain_tok_per_s": plain}
    rates["end_to_end"] = figures.get("end_to_end")
    names = ("batch_size", "context_length", "domain", "temperature", "top_p", "top_k", "proven", "reason")
    return {
        **{name: choice[name] for name in names},
        **{"setup" if name == "name" else name: value for name, value in setup.items()},
        "basis": bases[0] if bases else None,
        "speedup": speedup["estimate"],
        **{name: speedup.get(name) for name in ("low", "high")},
        **{name: rate and rate["estimate"] for name, rate in rates.items()},
    }


def _workloads(connection: Connection) -> Workloads:
    workloads = {}
    for row in _rows(connection, "SELECT workload FROM old_runs"):
        with contextlib.suppress(*DAMAGES):
            workload = {"top_p": 1.0, "top_k": 0, "seed": 0, "end_token_ids": [], **_json(row["workload"])}
            rule, sampling = "greedy equality", [0.0]
            if workload["temperature"] > 0.0:
                rule = "rejection sampling"
                sampling = [workload[name] for name in ("temperature", "top_p", "top_k", "seed")]
            key = [1, rule, sampling, workload["max_new_tokens"], sorted(workload["end_token_ids"])]
            workloads[digest_of(key)] = workload
    return workloads


def _copy_traces(connection: Connection, workloads: Workloads) -> None:
    def trace(row: Row, **arrays: list[Any]) -> Row:
        size = len(next(iter(arrays.values())))
        require(size > 0 and all(len(values) == size for values in arrays.values()), "unequal or empty")
        return {
            **{name: row[name] for name in ("sampling_digest", "prompt_digest")},
            "temperature": workloads.get(row["sampling_digest"], {}).get("temperature"),
            **{name: _packed(values) for name, values in arrays.items()},
        }

    def target_trace(row: Row) -> Row:
        arrays = {name: _json(row[name]) for name in ("token_ids", "target_probs", "logit_gaps")}
        return {**trace(row, **arrays), "ended": bool(row["ended"])}

    def acceptance_trace(row: Row) -> Row:
        accepted, confidences = _json(row["keep_probs"]), _json(row["confidences"])
        require(all(0.0 <= value <= 1.0 for value in accepted), "no probability")
        arrays = trace(row, accept_probs=accepted, confidences=confidences)
        counts = {"num_proposed": len(accepted) - 1, "num_accepted": math.fsum(accepted[1:])}  # [0] is the prefill's
        return {**arrays, **counts, **{name: row[name] for name in ("draft_digest", "draft_name")}}

    def lookup_trace(row: Row) -> Row:
        proposed, accepted = _json(row["proposed"]), _json(row["kept"])
        arrays = trace(row, proposed=proposed, accepted=accepted)
        in_order = all(0 <= a <= p <= row["max_length"] for a, p in zip(accepted, proposed, strict=True))
        require(in_order, "more accepted than proposed")
        counts = {"num_proposed": sum(proposed), "num_accepted": float(sum(accepted))}
        return {**arrays, **counts, **{name: row[name] for name in ("draft_digest", "draft_name", "max_length")}}

    _copy(connection, "target_traces", target_trace)
    _copy(connection, "acceptance_traces", acceptance_trace)
    _copy(connection, "lookup_traces", lookup_trace)


def _step_times(connection: Connection) -> Iterator[Row]:
    query = "SELECT sweeps.id AS sweep_id, old.* FROM old_step_times old JOIN sweeps ON sweeps.digest = old.sweep"
    for row in _rows(connection, query):
        about = {"sweep_id": row["sweep_id"], "component_digest": row["part_digest"], "component": row["part_name"]}
        with contextlib.suppress(*DAMAGES):
            for width, seconds in _json(row["samples_s"]):
                times = {"samples_s": _packed(list(map(float, seconds))), "median_s": median(seconds)}
                yield {**about, "width": width, **times, "disturbed": bool(row["disturbed"])}


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
        workload = workloads.get(sampling or "", {})
        yield {
            **{name: workload.get(name) for name in SAMPLING},
            "digest": digest_of([anchor, None]),
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
            setups[row["setup_digest"]] = _setup(_json(row["setup"]))
    return [{**setup, "digest": digest} for digest, setup in setups.items()]


def _setup(raw: Row) -> Row:
    draft = raw["draft"]
    if draft is None:
        return {"name": "plain", "draft": None, "draft_kind": None, "k": 0}
    kind, model = draft["kind"], draft.get("model") and draft["model"]["name"]
    ngram = f"ngram:max={draft.get('max_match')},min={draft.get('min_match')}"
    name = {
        "model": model,
        "ngram": ngram,
        "composite": f"{ngram}+{model}",
        "early_exit": f"early-exit:{draft.get('num_layers')}",
        "native": f"native:{draft.get('method')}" + (f"+{model}" if model else ""),
    }[kind]
    stop = "" if raw.get("stop_below") is None else f" stop<{raw['stop_below']:g}"
    return {"name": f"{name} k={raw['length']}{stop}", "draft": name, "draft_kind": kind, "k": raw["length"]}


def _named_setup(name: str) -> Row:
    """A setup by its name: of a draft with a path in its name, too."""
    match = SETUP_NAME.fullmatch(name)
    if match is None:
        return {"name": name, "draft": None, "draft_kind": None, "k": 0}
    draft = match["draft"]
    kinds = {"ngram:": "composite" if "+" in draft else "ngram", "early-exit:": "early_exit", "native:": "native"}
    kind = next((kind for start, kind in kinds.items() if draft.startswith(start)), "model")
    return {"name": name, "draft": draft, "draft_kind": kind, "k": int(match["k"])}
