"""The book: evidence, runs and policies in one database, saved a unit per transaction and found by digests.

What is once saved is never overwritten, and a process killed at any moment loses at most the unit under way. It must
not know how evidence is measured or judged, nor import torch, transformers, optuna or, to read, alembic.
"""

import itertools
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Select, Table, insert, literal, select, update

from profiles.engines.recorded import covers
from profiles.records.codec import plain
from profiles.records.core import Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import StoreError
from profiles.records.evidence import Acceptance, Infeasible, LookupTrace, Sample, StepTimes, TargetTrace
from profiles.records.keys import run_point, trace_point, unit_digest
from store import migrations, tables
from store.database import Database, Place, connect
from store.tables import Row

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What evidence is true for: a target on a machine under a workload; `origin` is whose arithmetic traces are."""

    target: Model
    environment: Environment
    workload: Workload
    origin: str = ""


class EvidenceStore:
    """An open store; use it in a `with` block or call `close`. Every method raises StoreError, in one line."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, place: Place, busy_timeout_s: float = 30.0) -> Self:
        """Open or make the store, a file's folder too, and upgrade an older schema in one transaction.

        Raises: NewerStoreError: a later draftpick wrote it. StoreError: not a store, locked, read-only, damaged.
        """
        return cls(connect(place, busy_timeout_s))._checked(cls._upgrade)

    @classmethod
    def open_read_only(cls, place: Place, busy_timeout_s: float = 5.0) -> Self:
        """Open a store that is there and has the newest schema; nothing is made, changed or upgraded, nor can be.

        Raises: as `open`, and StoreError for a store that is not there, is empty, or has an older schema.
        """
        return cls(connect(place, busy_timeout_s, read_only=True))._checked(cls._require_current)

    @property
    def place(self) -> str:
        """What to call the store: its file, or its URL without the password."""
        return self.database.name

    @property
    def path(self) -> Path:
        """The file of a store that is one. Raises StoreError for a server's."""
        if self.database.path is None:
            raise StoreError(f"store {self.place} is no file")
        return self.database.path

    @property
    def folder(self) -> Path:
        """The folder on this host that policy files go to."""
        return self.database.folder

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- evidence ---

    def find_target_trace(self, scope: Scope, prompt: Prompt) -> TargetTrace | None:
        found = self._records(tables.target_traces, _trace_key(scope, prompt), tables.target_trace_record)
        return found[0] if found else None

    def save_target_trace(
        self, scope: Scope, prompt: Prompt, trace: TargetTrace, *, first_answers: bool = False
    ) -> TargetTrace:
        """Save a trace; returns the one in the book, which must be equal, but for `first_answers`."""
        table, key = tables.target_traces, _trace_key(scope, prompt)
        is_new = self._save(scope, table, key, [tables.columns_from(trace)], first_answers=first_answers)
        return trace if is_new else self._records(table, key, tables.target_trace_record)[0]

    def find_acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, max_length: int) -> Acceptance | None:
        """The draft's trace; of look-up traces the longest, if it reaches `max_length` (shorter ones are prefixes)."""
        key = {**_trace_key(scope, prompt), "draft_digest": draft.digest}
        found = self._records(tables.acceptance_traces, key, tables.acceptance_record)
        if found:
            return found[0]
        lookups = self._records(tables.lookup_traces, key, tables.lookup_record)
        longest = max(lookups, key=lambda lookup: lookup.max_length, default=None)
        return longest if longest is not None and longest.max_length >= max_length else None

    def save_acceptance(
        self, scope: Scope, prompt: Prompt, draft: Draft, acceptance: Acceptance, *, first_answers: bool = False
    ) -> Acceptance:
        """As `save_target_trace`."""
        table, key = tables.acceptance_traces, {**_trace_key(scope, prompt), "draft_digest": draft.digest}
        record: Callable[[Row], Acceptance] = tables.acceptance_record
        if isinstance(acceptance, LookupTrace):
            table, record = tables.lookup_traces, tables.lookup_record
            key["max_length"] = acceptance.max_length
        row = {**tables.columns_from(acceptance), "draft_name": draft.name}
        is_new = self._save(scope, table, key, [row], first_answers=first_answers)
        return acceptance if is_new else self._records(table, key, record)[0]

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
                sweeps.setdefault(sweep, {})[times.component_digest] = times
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
        parts = {part.digest: part.name for draft in drafts for part in draft.components}
        names = {scope.target.run_digest: scope.target.name} | parts
        rows = [
            {**tables.columns_from(part), "part_name": names.get(digest, digest), "max_length": max_length}
            for digest, part in times.items()
        ]
        self._save(scope, tables.step_times, {"sweep": uuid.uuid4().hex}, rows)

    def find_samples(
        self, scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str, since: str = ""
    ) -> tuple[Sample, ...] | None:
        unit = _unit_key(scope, prompts, setups, purpose)
        return tuple(self._records(tables.samples, unit, tables.sample_record, since)) or None

    def save_samples(
        self,
        scope: Scope,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,
        samples: tuple[Sample, ...],
    ) -> tuple[Sample, ...]:
        """Save a unit unless the book has it; returns the unit in the book (two processes never time alike)."""
        asked = list(itertools.product(setups, prompts))
        if [(sample.setup_digest, sample.prompt_digest) for sample in samples] != [
            (setup.digest, prompt.digest) for setup, prompt in asked
        ]:
            raise StoreError(f"samples for {purpose!r} are not of the setups and prompts that were run: not saved")
        rows = [
            {**tables.columns_from(sample), "position": position, "setup_name": setup.name}
            for position, ((setup, _), sample) in enumerate(zip(asked, samples, strict=True))
        ]
        unit = _unit_key(scope, prompts, setups, purpose)
        is_new = self._save(scope, tables.samples, unit, rows, first_answers=True)
        return samples if is_new else tuple(self._records(tables.samples, unit, tables.sample_record))

    def save_infeasible(self, scope: Scope, found: Infeasible) -> None:
        with self.writing() as connection:
            row = {**_anchor_key(scope), **tables.infeasible_row(found)}
            _insert(connection, tables.infeasible, scope.target, scope.environment, [row])
            connection.commit()

    # --- runs and policies ---

    def save_run(self, scope: Scope) -> int:
        """Note that a run starts now; returns the id that `finish_run` takes."""
        with self.writing() as connection:
            row = {"workload": plain(scope.workload)}
            run_id = _insert(connection, tables.runs, scope.target, scope.environment, [row])
            connection.commit()
        return run_id

    def finish_run(self, run_id: int, outcome: Mapping[str, Any]) -> None:
        """Note that a run ends now, with JSON values that tell what came of it."""
        unfinished = (tables.runs.c.id == run_id) & tables.runs.c.finished_at.is_(None)
        with self.writing() as connection:
            ended = update(tables.runs).where(unfinished).values(finished_at=_utc_now(), outcome=dict(outcome))
            if connection.execute(ended).rowcount != 1:
                raise StoreError(f"run {run_id} is not under way")
            connection.commit()

    def replace_policy(self, target: Model, environment: Environment, made_from: Callable[[str | None], str]) -> None:
        """Save the policy made from the latest one of this target and machine; nobody saves another in between.

        What `made_from` raises leaves the book as it was.
        """
        with self.writing() as connection:
            latest = connection.scalar(_latest_policy(target.run_digest, environment))
            row = {"policy": made_from(latest)}
            _insert(connection, tables.policies, target, environment, [row])
            connection.commit()

    def latest_policy(self, target: str | None = None, environment: Environment | None = None) -> str | None:
        """The newest policy, of any target or of one (its run digest, digest or name), on any machine or on one."""
        with self.reading() as connection:
            return connection.scalar(_latest_policy(target, environment))

    def latest_outcome(self, target: Model, environment: Environment) -> dict[str, Any]:
        """What came of the target's last finished run on a machine, empty when there is none."""
        runs = tables.runs.c
        query = select(runs.outcome).where(runs.target_key == target.run_digest, runs.finished_at.is_not(None))
        query = query.where(runs.environment_digest == environment.digest)
        with self.reading() as connection:
            found = connection.scalar(query.order_by(runs.finished_at.desc(), runs.id.desc()).limit(1)) or {}
            if not isinstance(found, dict):
                kind = type(found).__name__
                raise StoreError(f"the last run of {target.name} is damaged: its outcome is {kind}, not an object")
        return found

    # --- the one way in and out ---

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that only reads, for queries that other modules of the store bring along."""
        return self.database.transaction("read")

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that keeps all other writers out; rolled back on leaving unless `commit()` was said."""
        return self.database.transaction("write")

    def _records(self, table: Table, key: Row, record: Callable[[Row], Record], since: str = "") -> list[Record]:
        """The rows with this key as records, oldest first."""
        with self.reading() as connection:
            return [record(row) for row in _find(connection, table, key) if row["measured_at"] >= since]

    def _save(
        self, scope: Scope, table: Table, key: Row, records: list[dict[str, Any]], *, first_answers: bool = False
    ) -> bool:
        """Save a unit as rows in one transaction; False: the book has it, equal or, with `first_answers`, any."""
        rows = [{**key, **record} for record in records]
        named = f"{table.name} of {scope.target.name}, {', '.join(f'{name} {value}' for name, value in key.items())}"
        if any(row[name] != value for row in rows for name, value in key.items()):
            raise StoreError(f"a record does not answer for {named}: not saved")

        def save(connection: Connection) -> bool:
            stored = _find(connection, table, key)
            if stored and not first_answers and not _equal(stored, rows):
                raise StoreError(
                    f"it holds another value for {named}: evidence is never overwritten; run again to use the stored "
                    "one, or name another store"
                )
            if not stored:
                _insert(connection, table, scope.target, scope.environment, rows)
            return not stored

        return self.database.write(save)

    def _checked(self, check: Callable[[Self], None]) -> Self:
        """This book, closed again when the check fails."""
        try:
            check(self)
        except BaseException:
            self.close()
            raise
        return self

    def _require_current(self) -> None:
        with self.reading() as connection:
            migrations.require_current(connection)

    def _upgrade(self) -> None:
        with self.reading() as connection:
            is_current = migrations.is_current(connection)  # another program's file is refused before it is changed
        self.database.use_write_ahead_log()
        if not is_current:
            with self.writing() as connection:
                if not migrations.is_current(connection):  # another process may have done it while this one waited
                    migrations.upgrade(connection)
                    connection.commit()


def _find(connection: Connection, table: Table, key: Row) -> list[Row]:
    made = table.c[tables.time_name(table.name)]  # a merged row may be older than those before it
    query = select(table).filter_by(**key).order_by(made, table.c.id)
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
    key = tables.models.c.key == model["key"]
    known = connection.execute(select(tables.models.c.name, tables.models.c.revision).where(key)).mappings().first()
    if known is None:
        connection.execute(insert(tables.models).values(model))
    elif known != labels:
        connection.execute(update(tables.models).where(key).values(labels))
    same = tables.environments.c.digest == environment.digest  # in which traits are not
    stored = connection.execute(select(tables.environments).where(same)).mappings().first()
    if stored is None:
        connection.execute(insert(tables.environments).values(machine))
    elif told := {name: value for name, value in machine.items() if stored[name] is None and value is not None}:
        connection.execute(update(tables.environments).where(same).values(told))
    made = {
        "target_key": model["key"],
        "environment_digest": environment.digest,
        tables.time_name(table.name): _utc_now(),
    }
    added = [connection.execute(insert(table).values({**made, **row})).inserted_primary_key for row in rows]
    last = added[-1]
    assert last is not None  # every row has an id of its own
    return int(last[0])


def _latest_policy(target: str | None, environment: Environment | None) -> Select[str]:
    """By the time it was made: a policy that came from elsewhere may be older than those that were there."""
    policy = tables.policies.c
    query = select(policy.policy).order_by(policy.created_at.desc(), policy.id.desc()).limit(1)
    if target is not None:
        model = tables.models.c
        query = query.join(tables.models).where(literal(target).in_([model.key, model.digest, model.name]))
    if environment is not None:
        query = query.where(policy.environment_digest == environment.digest)
    return query


def _trace_key(scope: Scope, prompt: Prompt) -> dict[str, Any]:
    sampling_digest, prompt_digest = trace_point(scope.workload, prompt, scope.origin)
    key = {"sampling_digest": sampling_digest, "prompt_digest": prompt_digest}
    return {"target_key": scope.target.run_digest, **key}


def _anchor_key(scope: Scope) -> dict[str, Any]:
    return {
        "target_key": scope.target.run_digest,
        "environment_digest": scope.environment.digest,
        "anchor_digest": scope.workload.timing_digest,
    }


def _unit_key(scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str) -> dict[str, Any]:
    key = {**_anchor_key(scope), "occasion": purpose}
    point = run_point(scope.workload, prompts, setups, purpose)
    return {**key, "unit": unit_digest(scope.target, scope.environment, point)}


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
