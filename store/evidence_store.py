"""Evidence, runs and policies in one database: saved a unit per transaction, found by digests.

What is saved once is never overwritten, and a process killed at any moment loses at most the unit under way. Reading
loads neither torch, optuna nor alembic.
"""

import functools
import itertools
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Select, Table, bindparam, func, insert, select, update

from profiles.builtin import IMPORTED_MARKS
from profiles.records.codec import to_builtins
from profiles.records.core import Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import StoreError
from profiles.records.evidence import (
    Acceptance,
    AcceptanceTrace,
    Infeasible,
    LookupTrace,
    Sample,
    StepTimes,
    TargetTrace,
    covers,
)
from profiles.records.files import real_path
from profiles.records.keys import run_point, sampling_settings, trace_point, unit_digest
from store import migrations, tables
from store.database import Database, Location, connect
from store.tables import Row, Values

Record = TypeVar("Record")
Trace = TypeVar("Trace", TargetTrace, Acceptance)

MOST_KEYS = 500  # in one statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What evidence is true for: a target on a machine under a workload; `origin` is whose arithmetic traces are."""

    target: Model
    environment: Environment
    workload: Workload
    origin: str = ""


class EvidenceStore(AbstractContextManager["EvidenceStore"]):
    """An open store; use it in a `with` block or call `close`. Every method raises StoreError, in one line."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._run_id: int | None = None  # of the run under way, which new evidence is put down to

    @classmethod
    def open(cls, location: Location, busy_timeout_s: float = 30.0) -> Self:
        """Open or make the store, a file's folder too, and upgrade an older schema in one transaction.

        Raises: NewerStoreError: a later draftpick wrote it. StoreError: not a store, locked, read-only, damaged.
        """
        return cls(connect(location, busy_timeout_s))._checked(cls._upgrade)

    @classmethod
    def open_read_only(cls, location: Location, busy_timeout_s: float = 5.0) -> Self:
        """Open a store that is there and has the newest schema; nothing is made, changed or upgraded, nor can be.

        Raises: as `open`, and StoreError for a store that is not there, is empty, or has an older schema.
        """
        return cls(connect(location, busy_timeout_s, read_only=True))._checked(cls._require_current)

    @property
    def name(self) -> str:
        """What to call the store: its file, or its URL without the password."""
        return self.database.name

    def close(self) -> None:
        self.database.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- evidence ---

    def find_target_trace(self, scope: Scope, prompt: Prompt) -> TargetTrace | None:
        return next(iter(self._find(TargetTrace, _trace_key(scope, prompt))), None)

    def save_target_trace(self, scope: Scope, prompt: Prompt, trace: TargetTrace) -> TargetTrace:
        """Save a trace unless the store has one; returns the stored one: of two processes the first answers."""
        return self._save_trace(scope, prompt, trace, {})

    def find_acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, max_length: int) -> Acceptance | None:
        """The draft's trace; of look-up traces the longest, if it reaches `max_length` (shorter ones are prefixes)."""
        key = {**_trace_key(scope, prompt), "draft_digest": draft.digest}
        if traces := self._find(AcceptanceTrace, key):
            return traces[0]
        longest = max(self._find(LookupTrace, key), key=lambda lookup: lookup.max_length, default=None)
        return longest if longest is not None and longest.max_length >= max_length else None

    def save_acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, acceptance: Acceptance) -> Acceptance:
        """As `save_target_trace`."""
        key: Values = {"draft_digest": draft.digest}
        key |= {"max_length": acceptance.max_length} if isinstance(acceptance, LookupTrace) else {}
        return self._save_trace(scope, prompt, acceptance, key, draft_name=draft.name)

    def find_step_times(
        self, scope: Scope, drafts: tuple[Draft, ...], *, context_length: int, max_length: int, since: str = ""
    ) -> dict[str, StepTimes] | None:
        """The newest sweep with `context_length` cached tokens, every draft and widths up to `max_length`.

        Undisturbed sweeps go first. `since`: only what was measured at that UTC time or later.
        """
        sweeps, steps = tables.sweeps, tables.step_times
        key = _about(scope.target, scope.environment)
        key |= {"batch_size": scope.workload.batch_size, "context_length": context_length}
        key["sampling"] = sampling_settings(scope.workload)
        query = select(sweeps.c.batch_size, sweeps.c.context_length, steps).join(steps).filter_by(**key)
        query = query.where(sweeps.c.max_length >= max_length, sweeps.c.measured_at >= since)

        def read(connection: Connection) -> list[dict[str, StepTimes]]:
            rows = connection.execute(query.order_by(sweeps.c.id.desc())).mappings()
            by_sweep = itertools.groupby(rows, lambda row: row["sweep_id"])
            return [tables.step_times_records(widths) for _, widths in by_sweep]

        newest_first = self.database.read(read)
        complete = [times for times in newest_first if covers(times, scope.target, drafts, max_length)]
        return min(complete, key=lambda times: any(part.disturbed for part in times.values()), default=None)

    def save_step_times(
        self, scope: Scope, drafts: tuple[Draft, ...], max_length: int, times: Mapping[str, StepTimes]
    ) -> None:
        """Add a sweep asked for lengths up to `max_length`; raises StoreError when it lacks a component or a width."""
        if not covers(times, scope.target, drafts, max_length):
            raise StoreError(
                f"step times of {scope.target.name} lack a draft or a target width of 1 to {max_length + 1}: not saved"
            )
        names = {part.digest: part.name for draft in drafts for part in draft.components}
        names |= {scope.target.run_digest: scope.target.name}
        [context_length] = {component.context_length for component in times.values()}
        row = {
            "digest": uuid.uuid4().hex,
            "batch_size": scope.workload.batch_size,
            "context_length": context_length,
            "max_length": max_length,
            "sampling": sampling_settings(scope.workload),
        }

        def save(connection: Connection) -> None:
            sweep_id = self._insert(connection, tables.sweeps, scope, row)
            for digest, component in times.items():
                rows = tables.step_times_rows(sweep_id, component, names.get(digest, digest))
                connection.execute(insert(tables.step_times), list(rows))

        self.database.write(save)

    def find_samples(
        self, scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str, since: str = ""
    ) -> tuple[Sample, ...] | None:
        """The samples of a unit of timed runs, if it was measured at the UTC time `since` or later."""
        samples, units = tables.samples, tables.units.c
        digests = tables.setups.c.digest.label("setup_digest"), tables.prompts.c.digest.label("prompt_digest")
        query = select(samples, *digests).join(tables.units).join(tables.setups).join(tables.prompts)
        query = query.where(units.digest == _unit_digest(scope, prompts, setups, purpose), units.measured_at >= since)

        def read(connection: Connection) -> tuple[Sample, ...]:
            rows = connection.execute(query.order_by(samples.c.position)).mappings()
            return tuple(map(tables.sample_record, rows))

        return self.database.read(read) or None

    def save_samples(
        self,
        scope: Scope,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,
        samples: tuple[Sample, ...],
    ) -> tuple[Sample, ...]:
        """Save a unit unless the store has it; returns the stored one (two processes never time alike)."""
        pairs = [(setup.digest, prompt.digest) for setup, prompt in itertools.product(setups, prompts)]
        if [(sample.setup_digest, sample.prompt_digest) for sample in samples] != pairs:
            raise StoreError(f"samples for {purpose!r} are not of the setups and prompts that were run: not saved")
        row = {"digest": _unit_digest(scope, prompts, setups, purpose), "purpose": purpose}

        def save(connection: Connection) -> bool:
            if _is_stored(connection, tables.units, {"digest": row["digest"]}):
                return False
            setup_ids = _register(connection, tables.setups, map(tables.setup_row, setups))
            prompt_ids = _register(connection, tables.prompts, map(tables.prompt_row, prompts))
            workload_id = self._workload_id(connection, scope)
            unit_id = self._insert(connection, tables.units, scope, {**row, "workload_id": workload_id})
            rows = [
                {
                    **tables.sample_row(sample),
                    "unit_id": unit_id,
                    "position": position,
                    "setup_id": setup_ids[sample.setup_digest],
                    "prompt_id": prompt_ids[sample.prompt_digest],
                }
                for position, sample in enumerate(samples)
            ]
            connection.execute(insert(tables.samples), rows)
            return True

        if self.database.write(save):
            return samples
        return self.find_samples(scope, prompts, setups, purpose) or samples

    def save_infeasible(self, scope: Scope, infeasible: Infeasible) -> None:
        def save(connection: Connection) -> None:
            setup = tables.setup_row(infeasible.setup)
            row = {
                **to_builtins(infeasible),
                "workload_id": self._workload_id(connection, scope),
                "setup_id": _register(connection, tables.setups, [setup])[setup["digest"]],
            }
            self._insert(connection, tables.infeasible, scope, row)

        self.database.write(save)

    # --- runs and policies ---

    def save_run(self, scope: Scope, prompts: Iterable[Prompt] = ()) -> int:
        """Note that a run starts; returns the id that `finish_run` takes. Evidence until then is put down to the run.

        The domains of `prompts` are noted where an older draftpick did not.
        """

        def save(connection: Connection) -> int:
            _register(connection, tables.prompts, map(tables.prompt_row, prompts))
            return self._insert(connection, tables.runs, scope, {"workload": to_builtins(scope.workload)})

        self._run_id = self.database.write(save)
        return self._run_id

    def finish_run(self, run_id: int, outcome: Mapping[str, Any]) -> None:
        """Note that a run ends now, with JSON values that tell what came of it."""
        runs, values = tables.runs.c, {"outcome": dict(outcome), **tables.run_costs(outcome)}

        def save(connection: Connection) -> None:
            unfinished = update(tables.runs).where(runs.id == run_id, runs.finished_at.is_(None))
            if connection.execute(unfinished.values(finished_at=_utc_now(), **values)).rowcount != 1:
                raise StoreError(f"run {run_id} is not under way")

        self.database.write(save)
        self._run_id = None

    def replace_policy(self, target: Model, environment: Environment, made_from: Callable[[str | None], str]) -> None:
        """Save the policy made from the latest one of this target and machine; nobody saves another in between.

        What `made_from` raises leaves the store as it was.
        """

        def save(connection: Connection) -> None:
            query = _newest_policies([target], environment).add_columns(tables.policies.c.generation)
            latest, generation = connection.execute(query).first() or (None, 0)
            text = made_from(latest)
            row = {**_about(target, environment), "generation": generation + 1, "policy": text}
            _register_subjects(connection, target, environment)
            policy_id = _inserted_id(connection, tables.policies, row)
            if choices := tables.choice_rows(policy_id, text):
                connection.execute(insert(tables.choices), choices)

        self.database.write(save)

    def latest_policy(self, target: str | None = None, environment: Environment | None = None) -> str | None:
        """The newest policy, of any target or of those of a name (`targets_named`), on any machine or on one."""

        def read(connection: Connection) -> str | None:
            targets = None if target is None else targets_named(connection, target)
            policy: str | None = connection.scalar(_newest_policies(targets, environment))
            return policy

        return self.database.read(read)

    def latest_outcome(self, target: Model, environment: Environment) -> dict[str, Any]:
        """What came of the target's last finished run on a machine, empty when there is none."""
        runs = tables.runs.c
        query = select(runs.outcome).where(runs.target_key == target.run_digest, runs.finished_at.is_not(None))
        query = query.where(runs.environment_digest == environment.digest)
        query = query.order_by(runs.id.desc()).limit(1)
        outcome = self.database.read(lambda connection: connection.scalar(query)) or {}
        if not isinstance(outcome, dict):
            raise StoreError(f"store {self.name}: the outcome of the last run of {target.name} is damaged")
        return outcome

    # --- transactions ---

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that only reads, for queries that other modules bring along."""
        return self.database.transaction("read")

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that keeps all other writers out; rolled back on leaving unless `commit()` was called."""
        return self.database.transaction("write")

    def _find(self, kind: type[Record], key: Row) -> list[Record]:
        table = tables.TRACES[kind]
        query = select(table).filter_by(**key).order_by(table.c.id)
        read = functools.partial(tables.from_row, kind)
        return self.database.read(lambda connection: list(map(read, connection.execute(query).mappings())))

    def _save_trace(self, scope: Scope, prompt: Prompt, trace: Trace, more_key: Row, **names: str) -> Trace:
        table, row = tables.TRACES[type(trace)], {**tables.trace_row(trace), **names}
        key = {**_trace_key(scope, prompt), **more_key}
        if any(row[name] != value for name, value in key.items() if name in row):
            wanted = ", ".join(f"{name} {value}" for name, value in key.items())
            raise StoreError(f"a trace is not of {scope.target.name}, {wanted}: not saved in {table.name}")

        def save(connection: Connection) -> bool:
            if _is_stored(connection, table, key):
                return False
            _register(connection, tables.prompts, [tables.prompt_row(prompt)])
            self._insert(connection, table, scope, {**key, **row, "temperature": scope.workload.temperature})
            return True

        return trace if self.database.write(save) else self._find(type(trace), key)[0]

    def _insert(self, connection: Connection, table: Table, scope: Scope, row: Row) -> int:
        """Insert a row with what it is about and in which run it was made; returns its id."""
        _register_subjects(connection, scope.target, scope.environment)
        about = _about(scope.target, scope.environment)
        if "run_id" in table.c:  # NULL where the run was deleted meanwhile
            about["run_id"] = select(tables.runs.c.id).where(tables.runs.c.id == self._run_id).scalar_subquery()
        return _inserted_id(connection, table, {**about, **row})

    @staticmethod
    def _workload_id(connection: Connection, scope: Scope) -> int:
        row = tables.workload_row(scope.workload)
        workload_id: int = _register(connection, tables.workloads, [row])[row["digest"]]
        return workload_id

    def _checked(self, check: Callable[[Self], None]) -> Self:
        """This store, closed again when the check fails."""
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


def _is_stored(connection: Connection, table: Table, key: Row) -> bool:
    return connection.execute(select(table.c.id).filter_by(**key).limit(1)).first() is not None


def _inserted_id(connection: Connection, table: Table, row: Row) -> int:
    made = {tables.time_name(table.name): _utc_now(), **row}
    [row_id] = connection.execute(insert(table).values(made)).inserted_primary_key or (0,)
    return int(row_id)


def _register(
    connection: Connection, table: Table, rows: Iterable[Row], *, key: str = "digest", labels: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Insert the rows whose key is new; of others fill in what was not known, and change `labels`.

    Returns the primary keys by key.
    """
    wanted = {row[key]: row for row in rows}
    stored: dict[str, Row] = {}
    for start in range(0, len(wanted), MOST_KEYS):
        keys = list(wanted)[start : start + MOST_KEYS]
        stored |= {row[key]: row for row in connection.execute(select(table).where(table.c[key].in_(keys))).mappings()}
    [primary] = table.primary_key.columns
    ids = {digest: row[primary.name] for digest, row in stored.items()}
    if new := [row for digest, row in wanted.items() if digest not in stored]:
        ids |= dict(connection.execute(insert(table).returning(table.c[key], primary), new).all())
    for digest, row in stored.items():
        changes = {
            name: value
            for name, value in wanted[digest].items()
            if row[name] != value and (row[name] is None or name in labels)
        }
        if changes:
            connection.execute(update(table).where(table.c[key] == digest).values(changes))
    return ids


def _register_subjects(connection: Connection, target: Model, environment: Environment) -> None:
    """Equal weights may be found under another name; an older draftpick did not store all that a machine has."""
    _register(connection, tables.models, [tables.model_row(target)], key="key", labels=("name", "revision"))
    _register(connection, tables.environments, [tables.environment_row(environment)])


@functools.cache
def _targets_query() -> Select[Any]:
    """Targets by name or digest, the one tuned last first; made once, because that takes a look-up's time."""
    models = tables.models
    tuned = select(func.max(tables.policies.c.id)).where(tables.policies.c.target_key == models.c.key)
    named = bindparam("name").in_([models.c.key, models.c.digest, models.c.name])
    spelled = models.c.name.in_(bindparam("spellings", expanding=True))
    last_part = models.c.name.like(bindparam("last_part"), escape="\\")
    condition = bindparam("any_name") | named | spelled | last_part
    return select(models).where(condition).order_by(tuned.scalar_subquery().desc().nulls_last())


def targets_named(connection: Connection, name: str | None) -> list[Model]:
    """The targets of this name, path, last part of a path, digest or run digest; all when None. The one tuned last
    comes first.
    """
    path = name or ""
    spellings = [os.path.abspath(path), real_path(path), *(f"{mark}{Path(path).name}" for mark in IMPORTED_MARKS)]
    part = path.strip("/")
    last_part = "%/" + re.sub(r"([%_\\])", r"\\\1", part) if part and "/" not in part else ""
    values = {"name": name, "any_name": name is None, "spellings": spellings, "last_part": last_part}
    return [tables.from_row(Model, row) for row in connection.execute(_targets_query(), values).mappings()]


def _newest_policies(targets: Iterable[Model] | None, environment: Environment | None) -> Select[Any]:
    """The newest policy of each target and machine, or of those named; the one saved last comes first."""
    policies = tables.policies.c
    query = select(policies.policy).where(tables.IS_NEWEST_POLICY).order_by(policies.id.desc())
    if targets is not None:
        query = query.where(policies.target_key.in_([target.run_digest for target in targets]))
    if environment is not None:
        query = query.where(policies.environment_digest == environment.digest)
    return query.limit(1)


def _about(target: Model, environment: Environment) -> Values:
    return {"target_key": target.run_digest, "environment_digest": environment.digest}


def _trace_key(scope: Scope, prompt: Prompt) -> Values:
    point = trace_point(scope.workload, prompt, scope.origin)
    return dict(zip(("target_key", "sampling_digest", "prompt_digest"), (scope.target.run_digest, *point), strict=True))


def _unit_digest(scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str) -> str:
    return unit_digest(scope.target, scope.environment, run_point(scope.workload, prompts, setups, purpose))


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
