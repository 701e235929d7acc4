"""The book: evidence, runs and policies in one SQLite file, saved a unit per transaction and found by digests.

What is once saved is never overwritten, and a process killed at any moment loses at most the unit under way. It must
not know how evidence is measured or judged, nor import torch, transformers or optuna.
"""

import functools
import itertools
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import sqlalchemy
from sqlalchemy import Connection, Engine, Table, literal, select, update
from sqlalchemy.dialects.sqlite import insert

from profiles.errors import StoreError
from profiles.keys import run_point, trace_point, unit_digest
from profiles.recorded import covers, plain
from profiles.terms import (
    Acceptance,
    Draft,
    Environment,
    Infeasible,
    LookupTrace,
    Model,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
)
from store import migrations, tables
from store.tables import Row

Record = TypeVar("Record")

_REASONS = {
    sqlite3.SQLITE_BUSY: "another process keeps it locked: wait for it to end, then run again",
    sqlite3.SQLITE_LOCKED: "another process keeps it locked: wait for it to end, then run again",
    sqlite3.SQLITE_READONLY: "it is read-only: allow writing or name another store",
    sqlite3.SQLITE_IOERR: "the disk failed or is full: what was saved before is kept",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore a copy or name another store",
    sqlite3.SQLITE_FULL: "the disk is full: what was saved before is kept; free space, then run again",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: name a file in a folder that may be written",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database: name another store",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What evidence is true for: a target on a machine under a workload."""

    target: Model
    environment: Environment
    workload: Workload


class Book:
    """An open store; use it in a `with` block or call `close`. Every method raises StoreError, in one line."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path, busy_timeout_s: float = 30.0) -> Self:
        """Open or make the store at `path`, its folder too, and upgrade an older schema in one transaction.

        Raises: NewerStoreError: a later draftpick wrote it. StoreError: not a store, locked, read-only, damaged.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {path}: its folder cannot be made: {error.strerror}") from error
        book = cls(path, _connect(path, busy_timeout_s))
        try:
            book._upgrade(busy_timeout_s)
        except BaseException:
            book.close()
            raise
        return book

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- evidence ---

    def find_target_trace(self, scope: Scope, prompt: Prompt) -> TargetTrace | None:
        found = self._records(tables.target_traces, _trace_key(scope, prompt), tables.target_trace_record)
        return found[0] if found else None

    def save_target_trace(self, scope: Scope, prompt: Prompt, trace: TargetTrace) -> None:
        self._save(scope, tables.target_traces, _trace_key(scope, prompt), [plain(trace)])

    def find_acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, max_length: int) -> Acceptance | None:
        """The draft's trace; of look-up traces the longest, if it reaches `max_length` (shorter ones are prefixes)."""
        key = {**_trace_key(scope, prompt), "draft_digest": draft.digest}
        found = self._records(tables.acceptance_traces, key, tables.acceptance_record)
        if found:
            return found[0]
        lookups = self._records(tables.lookup_traces, key, tables.lookup_record)
        longest = max(lookups, key=lambda lookup: lookup.max_length, default=None)
        return longest if longest is not None and longest.max_length >= max_length else None

    def save_acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, acceptance: Acceptance) -> None:
        key = {**_trace_key(scope, prompt), "draft_digest": draft.digest}
        table = tables.acceptance_traces
        if isinstance(acceptance, LookupTrace):
            table, key = tables.lookup_traces, {**key, "max_length": acceptance.max_length}
        self._save(scope, table, key, [{**plain(acceptance), "draft_name": draft.name}])

    def find_step_times(
        self, scope: Scope, drafts: tuple[Draft, ...], shape: tuple[int, int], since: str = ""
    ) -> dict[str, StepTimes] | None:
        """The newest sweep for `shape`, (cached tokens, longest length), with every draft; undisturbed ones go first.

        `since`: only what was measured at that UTC time or later; so too in `find_samples`.
        """
        context_length, max_length = shape
        key = {
            "target_key": scope.target.run_digest,
            "environment_digest": scope.environment.digest,
            "batch_size": scope.workload.batch_size,
            "context_length": context_length,
        }
        sweeps: dict[str, dict[str, StepTimes]] = {}
        for sweep, measured_length, times in self._records(tables.step_times, key, tables.sweep_record, since):
            if measured_length >= max_length:
                sweeps.setdefault(sweep, {})[times.part_digest] = times
        complete = [sweep for sweep in sweeps.values() if covers(sweep, scope.target, drafts, max_length)]
        newest_first = reversed(complete)  # and `min` takes the first of equals
        return min(newest_first, key=lambda sweep: any(part.disturbed for part in sweep.values()), default=None)

    def save_step_times(
        self, scope: Scope, drafts: tuple[Draft, ...], max_length: int, times: Mapping[str, StepTimes]
    ) -> None:
        """Add a sweep asked for lengths up to `max_length`; raises StoreError when it lacks a part or a width."""
        if not covers(times, scope.target, drafts, max_length):
            raise StoreError(
                f"step times of {scope.target.name} lack a draft or a target width of 1 to {max_length + 1}: not saved"
            )
        parts = {part.digest: part.name for draft in drafts for part in draft.parts}
        names = {scope.target.run_digest: scope.target.name} | parts
        rows = [
            {**plain(part), "part_name": names.get(digest, digest), "max_length": max_length}
            for digest, part in times.items()
        ]
        self._save(scope, tables.step_times, {"sweep": uuid.uuid4().hex}, rows)

    def find_samples(
        self, scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], occasion: str, since: str = ""
    ) -> tuple[Sample, ...] | None:
        unit = _unit_key(scope, prompts, setups, occasion)
        return tuple(self._records(tables.samples, unit, tables.sample_record, since)) or None

    def save_samples(
        self,
        scope: Scope,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        occasion: str,
        samples: tuple[Sample, ...],
    ) -> tuple[Sample, ...]:
        """Save a unit unless the book has it; returns the unit in the book (two processes never time alike)."""
        asked = list(itertools.product(setups, prompts))
        if [(sample.setup_digest, sample.prompt_digest) for sample in samples] != [
            (setup.digest, prompt.digest) for setup, prompt in asked
        ]:
            raise StoreError(f"samples for {occasion!r} are not of the setups and prompts that were run: not saved")
        rows = [
            {**plain(sample), "position": position, "setup_name": setup.name}
            for position, ((setup, _), sample) in enumerate(zip(asked, samples, strict=True))
        ]
        unit = _unit_key(scope, prompts, setups, occasion)
        self._save(scope, tables.samples, unit, rows, first_answers=True)
        return tuple(self._records(tables.samples, unit, tables.sample_record))

    def save_infeasible(self, scope: Scope, found: Infeasible) -> None:
        with self._transaction("write") as connection:
            row = {**_anchor_key(scope), **tables.infeasible_row(found)}
            _insert(connection, tables.infeasible, scope.target, scope.environment, [row])
            connection.commit()

    # --- runs and policies ---

    def save_run(self, scope: Scope) -> int:
        """Note that a run starts now; returns the id that `finish_run` takes."""
        with self._transaction("write") as connection:
            row = {"workload": plain(scope.workload)}
            run_id = _insert(connection, tables.runs, scope.target, scope.environment, [row])
            connection.commit()
        return run_id

    def finish_run(self, run_id: int, outcome: Mapping[str, Any]) -> None:
        """Note that a run ends now, with JSON values that tell what came of it."""
        unfinished = (tables.runs.c.id == run_id) & tables.runs.c.finished_at.is_(None)
        with self._transaction("write") as connection:
            ended = update(tables.runs).where(unfinished).values(finished_at=_utc_now(), outcome=dict(outcome))
            if connection.execute(ended).rowcount != 1:
                raise StoreError(f"run {run_id} is not under way")
            connection.commit()

    def save_policy(self, json_text: str, target: Model, environment: Environment) -> None:
        with self._transaction("write") as connection:
            _insert(connection, tables.policies, target, environment, [{"policy": json_text}])
            connection.commit()

    def latest_policy(self, target: str | None = None, environment: Environment | None = None) -> str | None:
        """The policy saved last, of any target or of one (its run digest, digest or name), on any machine or on one."""
        query = select(tables.policies.c.policy).order_by(tables.policies.c.id.desc())
        if target is not None:
            model = tables.models.c
            query = query.join(tables.models).where(literal(target).in_([model.key, model.digest, model.name]))
        if environment is not None:
            query = query.where(tables.policies.c.environment_digest == environment.digest)
        with self._transaction("read") as connection:
            return connection.scalar(query.limit(1))

    def latest_outcome(self, target: Model) -> dict[str, Any]:
        """What came of the target's last finished run, empty when there is none."""
        runs = tables.runs.c
        query = select(runs.outcome).where(runs.target_key == target.run_digest, runs.finished_at.is_not(None))
        with self._transaction("read") as connection:
            found = connection.scalar(query.order_by(runs.id.desc()).limit(1)) or {}
            if not isinstance(found, dict):
                kind = type(found).__name__
                raise StoreError(
                    f"the outcome of the last run of {target.name} is damaged: {kind} instead of an object"
                )
        return found

    # --- the one way in and out ---

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that only reads, for queries that other modules of the store bring along."""
        return self._transaction("read")

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that writes, as `reading`; who asks for it says `commit()`."""
        return self._transaction("write")

    @contextmanager
    def _transaction(self, purpose: Literal["read", "write"]) -> Iterator[Connection]:
        """One transaction, rolled back on leaving unless `commit()` was said; driver errors become StoreError.

        A write takes its lock at the start: two processes then wait for each other instead of failing midway.
        """
        begin = "BEGIN IMMEDIATE" if purpose == "write" else "BEGIN"
        try:
            with self._engine.connect() as connection:
                yield connection.execution_options(sqlite_begin=begin)
        except StoreError as error:
            raise type(error)(f"store {self.path}: {error}") from error
        except (sqlalchemy.exc.DBAPIError, sqlite3.Error) as error:
            raise StoreError(f"store {self.path}: {_reason(error)}") from error
        except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(f"store {self.path}: a row cannot be read or written: {reason}") from error

    def _records(self, table: Table, key: Row, record: Callable[[Row], Record], since: str = "") -> list[Record]:
        """The rows with this key as records, oldest first."""
        with self._transaction("read") as connection:
            return [record(row) for row in _find(connection, table, key) if row["measured_at"] >= since]

    def _save(
        self, scope: Scope, table: Table, key: Row, records: list[dict[str, Any]], *, first_answers: bool = False
    ) -> None:
        """Save a unit as rows in one transaction; a stored one stays and, but for `first_answers`, must be equal."""
        rows = [{**key, **record} for record in records]
        named = f"{table.name} of {scope.target.name}, {', '.join(f'{name} {value}' for name, value in key.items())}"
        if any(row[name] != value for row in rows for name, value in key.items()):
            raise StoreError(f"a record does not answer for {named}: not saved")
        with self._transaction("write") as connection:
            stored = _find(connection, table, key)
            if stored and not first_answers and not _equal(stored, rows):
                raise StoreError(
                    f"it holds another value for {named}: evidence is never overwritten; run again to use the stored "
                    "one, or name another store"
                )
            if not stored:
                _insert(connection, table, scope.target, scope.environment, rows)
                connection.commit()

    def _upgrade(self, busy_timeout_s: float) -> None:
        with self._transaction("read") as connection:
            is_current = migrations.is_current(connection)  # another program's file is refused before it is changed
        with self._transaction("read") as connection:
            _use_write_ahead_log(connection, busy_timeout_s)
        if not is_current:
            with self._transaction("write") as connection:
                if not migrations.is_current(connection):  # another process may have done it while this one waited
                    migrations.upgrade(connection)
                    connection.commit()


def _connect(path: Path, busy_timeout_s: float) -> Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=str(path)),
        # isolation_level None: sqlite3 sends no BEGIN of its own, so that schema changes are in the transaction too
        connect_args={"timeout": busy_timeout_s, "isolation_level": None},
        json_serializer=functools.partial(json.dumps, allow_nan=False, separators=(",", ":")),
    )

    @sqlalchemy.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine


def _use_write_ahead_log(connection: Connection, busy_timeout_s: float) -> None:
    driver: Any = connection.connection.driver_connection  # SQLAlchemy would begin a transaction: too late to change it
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            driver.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:  # SQLite does not wait by itself when the mode is changed
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _reason(error: Exception) -> str:
    cause = getattr(error, "orig", error)  # SQLAlchemy keeps the driver's error in it
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    return f"{cause}: {_REASONS[code]}" if code in _REASONS else f"{cause}"


def _find(connection: Connection, table: Table, key: Row) -> list[Row]:
    query = select(table).filter_by(**key).order_by(table.c.id)
    return [dict(row) for row in connection.execute(query).mappings()]


def _equal(stored: list[Row], rows: list[dict[str, Any]]) -> bool:
    """Whether rows hold the same evidence; what a draft is called is no evidence."""
    return len(stored) == len(rows) and all(
        old[name] == value
        for old, new in zip(stored, rows, strict=True)
        for name, value in new.items()
        if name not in tables.LABELS
    )


def _insert(
    connection: Connection, table: Table, target: Model, environment: Environment, rows: list[dict[str, Any]]
) -> int:
    """Insert rows with where and when they were made; returns the id of the last."""
    model, machine = tables.model_row(target), tables.environment_row(environment)
    labels = {"name": target.name, "revision": target.revision}  # equal weights may be found under another name
    connection.execute(insert(tables.models).values(model).on_conflict_do_update(index_elements=["key"], set_=labels))
    connection.execute(insert(tables.environments).values(machine).on_conflict_do_nothing())
    made = {
        "target_key": model["key"],
        "environment_digest": environment.digest,
        tables.time_name(table.name): _utc_now(),
    }
    row_ids = [connection.execute(insert(table).values({**made, **row})).lastrowid for row in rows]
    return int(row_ids[-1])


def _trace_key(scope: Scope, prompt: Prompt) -> dict[str, Any]:
    sampling_digest, prompt_digest = trace_point(scope.workload, prompt)
    key = {"sampling_digest": sampling_digest, "prompt_digest": prompt_digest}
    return {"target_key": scope.target.run_digest, **key}


def _anchor_key(scope: Scope) -> dict[str, Any]:
    return {
        "target_key": scope.target.run_digest,
        "environment_digest": scope.environment.digest,
        "anchor_digest": scope.workload.anchor_digest,
    }


def _unit_key(scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], occasion: str) -> dict[str, Any]:
    key = {**_anchor_key(scope), "occasion": occasion}
    point = run_point(scope.workload, prompts, setups, occasion)
    return {**key, "unit": unit_digest(scope.target, scope.environment, point)}


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
