"""What a store knows, how old it is and from which machine: the answer to `show`, as records and as a table.

It counts rows and reads times; it loads no evidence and no torch, and what is counted it does not judge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import sqlalchemy
from sqlalchemy import Connection, Integer, cast, func, select

from profiles.records.codec import draft_from, environment_from, model_from
from profiles.records.core import Environment, Model, Setup
from profiles.records.errors import StoreError
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
    """Everything the store holds about one target, measured on one machine with one set of software.

    `rows`: table -> number of rows, tables without any left out. `oldest` and `newest`: UTC, ISO 8601. `disturbed`:
    share of the timed runs that other programs disturbed, None without a run. `is_here`: whether the machine is the
    asked one, None when none was asked. `failures`: the latest three different ones, newest first.
    """

    target: Model
    environment: Environment
    rows: dict[str, int]
    oldest: str
    newest: str
    disturbed: float | None
    is_here: bool | None
    failures: tuple[Failure, ...]


def inventory(evidence_store: EvidenceStore, here: str | None = None) -> tuple[Entry, ...]:
    """One entry per target (float type included) and machine, newest first; `here` is this machine's digest.

    Raises StoreError when the store cannot be read.
    """
    with evidence_store.reading() as connection:
        spans = {table.name: list(_spans(connection, table)) for table in tables.ABOUT_TARGETS}
        disturbed, failures = _disturbed(connection), _failures(connection)
        models = _records(connection, tables.models, "key", model_from)
        machines = _records(connection, tables.environments, "digest", environment_from)
        rows: dict[Key, dict[str, int]] = {}
        times: dict[Key, list[str]] = {}
        for table, found in spans.items():
            for key, count, oldest, newest in found:
                if key[0] not in models or key[1] not in machines:
                    raise StoreError(
                        f"{table} are about {' or '.join(key)}, which it does not have: the file is damaged"
                    )
                rows.setdefault(key, {})[table] = count
                times.setdefault(key, []).extend((_utc(oldest), _utc(newest)))
        entries = [
            Entry(
                target=models[key[0]],
                environment=machines[key[1]],
                rows=counted,
                oldest=min(times[key]),
                newest=max(times[key]),
                disturbed=disturbed.get(key),
                is_here=None if here is None else key[1] == here,
                failures=tuple(failures.get(key, ())),
            )
            for key, counted in rows.items()
        ]
    return tuple(sorted(entries, key=lambda entry: entry.newest, reverse=True))


def _spans(connection: Connection, table: sqlalchemy.Table) -> Iterator[tuple[Key, int, str, str]]:
    """Of every target and machine in a table: how many rows, the first one's time and the last one's."""
    made = table.c[tables.time_name(table.name)]
    about = table.c.target_key, table.c.environment_digest
    query = select(*about, func.count(), func.min(made), func.max(made)).group_by(*about)
    for target_key, machine, count, oldest, newest in connection.execute(query):
        yield (target_key, machine), count, oldest, newest


def _utc(text: str) -> str:
    """The time as it is. Raises ValueError when it is none that has a zone."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"time {text!r} without a zone")
    return text


def _disturbed(connection: Connection) -> dict[Key, float]:
    samples = tables.samples.c
    about = samples.target_key, samples.environment_digest
    query = select(*about, func.avg(cast(samples.disturbed, Integer))).group_by(*about)
    return {(target_key, machine): float(share) for target_key, machine, share in connection.execute(query)}


def _failures(connection: Connection) -> dict[Key, list[Failure]]:
    """The latest different failures, at most three of a target and machine; one that repeats is told once."""
    found: dict[Key, dict[tuple[str, str], Failure]] = {}
    query = select(tables.infeasible).order_by(tables.infeasible.c.id.desc())
    for row in connection.execute(query).mappings():
        latest = found.setdefault((row["target_key"], row["environment_digest"]), {})
        if len(latest) < MOST_FAILURES:
            failure = Failure(
                setup_name=_setup_name(row["setup"]),
                reason=row["reason"],
                detail=row["detail"],
                seen=row["measured_at"],
            )
            latest.setdefault((row["setup_digest"], row["reason"]), failure)
    return {key: list(latest.values()) for key, latest in found.items()}


def _setup_name(stored: tables.Row) -> str:
    draft = None if stored["draft"] is None else draft_from(stored["draft"])
    return Setup(draft=draft, length=stored["length"], stop_below=stored["stop_below"]).name


def _records(
    connection: Connection, table: sqlalchemy.Table, key: str, record: Callable[[tables.Row], Record]
) -> dict[str, Record]:
    """A table of named things by their key, which is no part of the record."""
    rows = connection.execute(select(table)).mappings()
    return {row[key]: record({name: row[name] for name in row if name != key}) for row in rows}
