"""Forecasts of all candidates, and the storage that keeps Optuna's studies for optuna-dashboard.

Evidence is never read back from studies.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import StoreError
from tuner.policy.estimates import Forecast
from tuner.search.objective import score

STORED_TRIALS = 100
BUSY_TIMEOUT_S = 30.0  # other runs may write to the same studies

Storage: TypeAlias = optuna.storages.BaseStorage
FAILURES = (
    sqlite3.Error,
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.OptunaError,
    StoreError,
    OSError,
    RuntimeError,
)


class _UnsyncedConnection(sqlite3.Connection):
    """Does not wait for the disk: Optuna commits each trial by itself, and no evidence is in a study."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.execute("PRAGMA synchronous = OFF")


def open_storage(
    location: Path | str,
    engine_options: Mapping[str, Any] | None = None,
    lock: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Storage | None:
    """Opens Optuna's own database, made where there is none; None, with a warning, when that cannot be done.

    Args:
        location: a SQLite file, or a database URL.
        engine_options: SQLAlchemy's.
        lock: keeps other processes out while Optuna makes its tables, which it does without a lock.
    """
    options = dict(engine_options or {})
    url = str(location)
    if isinstance(location, Path):
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_S, "factory": _UnsyncedConnection}
        url = sqlalchemy.URL.create("sqlite", database=str(location)).render_as_string()
    try:
        if isinstance(location, Path):
            with contextlib.closing(sqlite3.connect(location)) as connection:
                connection.execute("PRAGMA schema_version")  # no file of another kind is changed
        if not _has_tables(url, options):
            with lock():
                if not _has_tables(url, options):
                    optuna.storages.RDBStorage(url, engine_kwargs=options)
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        storage.get_all_studies()
    except FAILURES as error:
        _warn(error)
        return None
    return storage


def _has_tables(url: str, options: Mapping[str, Any]) -> bool:
    engine = sqlalchemy.create_engine(url, **options)
    try:
        return sqlalchemy.inspect(engine).has_table("alembic_version")  # which Optuna makes last
    finally:
        engine.dispose()


def store_study(name: str, direction: str, trials: Iterable[optuna.trial.FrozenTrial], storage: Storage | None) -> None:
    """Copies trials to `storage`; when that fails a warning is logged, because no evidence is in a study."""
    if storage is None:
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        optuna.create_study(study_name=name, storage=storage, direction=direction).add_trials(trials)
    except FAILURES as error:
        _warn(error)


def _warn(error: Exception) -> None:
    reason = str(error.__cause__ or error).splitlines()[0]
    logging.getLogger(__name__).warning("Optuna's studies are not stored: %s; no evidence is in them", reason)


def space_of(setups: Iterable[Setup]) -> dict[str, BaseDistribution]:
    """The draft (`plain`: none) and the length, of the trials of these setups."""
    points = [params_of(setup) for setup in setups]
    drafts = list(dict.fromkeys(point["draft"] for point in points))
    return {"draft": CategoricalDistribution(drafts), "k": IntDistribution(0, max(point["k"] for point in points))}


def params_of(setup: Setup) -> dict[str, Any]:
    """A setup as a point of `space_of`; setups that differ in `stop_below` alone share one."""
    return {"draft": setup.draft.name if setup.draft else PLAIN.name, "k": setup.length}


def search_forecasts(
    candidates: Sequence[Setup], forecast: Callable[[Setup], Forecast], *, study_name: str, storage: Storage | None
) -> list[Forecast]:
    """Forecasts every candidate, best score first; the best 100 are stored as trials of `study_name`."""
    forecasts = sorted((forecast(setup) for setup in candidates), key=score, reverse=True)
    if storage is not None:
        space = space_of(candidates)
        stored = [each for each in forecasts if each.setup == PLAIN]
        stored += [each for each in forecasts if each.setup != PLAIN][: STORED_TRIALS - 1]
        trials = [
            optuna.trial.create_trial(
                params=params_of(each.setup),
                distributions=space,
                value=score(each),
                user_attrs={"setup": each.setup.name, "speedup": each.speedup.estimate},
            )
            for each in stored
        ]
        store_study(study_name, "maximize", trials, storage)
    return forecasts
