"""What a store holds, how old it is and from which machine: the answer to `show`, as records.

It counts rows and reads times; it loads no evidence and no torch.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, Integer, Table, cast, func, select

from profiles.records.core import Environment, Model
from store import tables
from store.evidence_store import EvidenceStore

Record = TypeVar("Record")
Key = tuple[str, str]  # a target's run digest and a machine's digest

MOST_FAILURES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A setup that could not be measured, why, and when that was last seen (UTC, ISO 8601)."""

    setup_name: str
    reason: str
    detail: str
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Everything the store holds about one target, measured on one machine with one set of software."""

    target: Model
    environment: Environment
    rows: dict[str, int]  # table -> number of rows; tables without any are left out
    oldest: str  # UTC, ISO 8601
    newest: str
    disturbed: float | None  # share of the timed runs that other programs disturbed; None without a run
    failures: tuple[Failure, ...]  # the latest three different ones, newest first


def inventory(evidence_store: EvidenceStore) -> tuple[Entry, ...]:
    """One entry per target (float type included) and machine, newest first."""
    rows: defaultdict[Key, dict[str, int]] = defaultdict(dict)
    times: defaultdict[Key, list[str]] = defaultdict(list)
    with evidence_store.reading() as connection:
        models = _records(connection, tables.models, "key", Model)
        machines = _records(connection, tables.environments, "digest", Environment)
        samples, failures = _samples(connection), _failures(connection)
        for table in tables.ABOUT_TARGETS:
            about, made = (table.c.target_key, table.c.environment_digest), table.c[tables.time_name(table.name)]
            query = select(*about, func.count(), func.min(made), func.max(made)).group_by(*about)
            for target_key, machine, count, *span in connection.execute(query):
                key = target_key, machine
                rows[key] |= {"samples": samples[key][0]} if table is tables.units else {table.name: count}
                times[key] += map(_utc, span)
        entries = [
            Entry(
                target=models[key[0]],
                environment=machines[key[1]],
                rows=counts,
                oldest=min(times[key]),
                newest=max(times[key]),
                disturbed=samples[key][1] if key in samples else None,
                failures=tuple(failures.get(key, ())),
            )
            for key, counts in rows.items()
        ]
    return tuple(sorted(entries, key=lambda entry: entry.newest, reverse=True))


def _utc(text: str) -> str:
    """The time as it is. Raises ValueError when it has no zone."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"time {text!r} without a zone")
    return text


def _samples(connection: Connection) -> dict[Key, tuple[int, float]]:
    """Of every target and machine: how many samples of timed runs, and which share of them was disturbed."""
    about = tables.units.c.target_key, tables.units.c.environment_digest
    disturbed = func.avg(cast(tables.samples.c.disturbed, Integer))
    query = select(*about, func.count(), disturbed).join_from(tables.samples, tables.units).group_by(*about)
    return {(target, machine): (count, float(share)) for target, machine, count, share in connection.execute(query)}


def _failures(connection: Connection) -> dict[Key, list[Failure]]:
    """The latest different failures, at most three of a target and machine; one that repeats is listed once."""
    failures: dict[Key, dict[tuple[int, str], Failure]] = {}
    query = select(tables.infeasible, tables.setups.c.name).join(tables.setups).order_by(tables.infeasible.c.id.desc())
    for row in connection.execute(query).mappings():
        latest = failures.setdefault((row["target_key"], row["environment_digest"]), {})
        if len(latest) < MOST_FAILURES:
            failure = Failure(
                setup_name=row["name"], reason=row["reason"], detail=row["detail"], seen=row["measured_at"]
            )
            latest.setdefault((row["setup_id"], row["reason"]), failure)
    return {key: list(latest.values()) for key, latest in failures.items()}


def _records(connection: Connection, table: Table, key: str, kind: type[Record]) -> dict[str, Record]:
    return {row[key]: tables.from_row(kind, row) for row in connection.execute(select(table)).mappings()}
