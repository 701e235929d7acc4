"""Forecasts of all candidates, and the storage that keeps Optuna's studies for optuna-dashboard.

Evidence is never read back from studies.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import optuna

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import StoreError
from tuner.policy.estimates import Forecast
from tuner.search.objective import score

STORED_TRIALS = 100
BUSY_TIMEOUT_S = 30.0  # other runs may write to the same studies

Storage: TypeAlias = optuna.storages.BaseStorage


@contextlib.contextmanager
def storage_errors(name: str, advice: str) -> Iterator[None]:
    """Turns the errors of Optuna's database into a StoreError of one line."""
    try:
        yield
    except (sqlite3.Error, optuna.exceptions.StorageInternalError, optuna.exceptions.DuplicatedStudyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StoreError(f"{name}: {reason}; {advice}, no evidence is in it") from error


def open_storage(location: Path | str, name: str = "", engine_options: Mapping[str, Any] | None = None) -> Storage:
    """Opens Optuna's own database, made where there is none.

    Optuna creates its tables without a lock, so the caller must keep other processes out.

    Args:
        location: a SQLite file, or a database URL.
        name: what errors call it, because a URL may hold a password.
        engine_options: SQLAlchemy's.

    Raises:
        StoreError: it is not Optuna's, it is of a newer version, or it cannot be opened.
    """
    title = f"studies {name or location}"
    with storage_errors(title, "move the file away" if isinstance(location, Path) else "drop its schema"):
        options = dict(engine_options or {})
        if isinstance(location, Path):
            with contextlib.closing(sqlite3.connect(location)) as connection:
                connection.execute("PRAGMA schema_version")  # Optuna lets SQLAlchemy's errors through at opening
            options["connect_args"] = {"timeout": BUSY_TIMEOUT_S}
        try:
            url = f"sqlite:///{location}" if isinstance(location, Path) else location
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        except RuntimeError as error:
            raise StoreError(f"{title}: {error}") from error
        storage.get_all_studies()
    return storage


@storage_errors("Optuna's studies", "run again")
def search_forecasts(
    candidates: Sequence[Setup], forecast: Callable[[Setup], Forecast], *, study_name: str, storage: Storage | None
) -> list[Forecast]:
    """Forecasts every candidate, best score first; the best 100 are stored as trials of `study_name`."""
    forecasts = sorted((forecast(setup) for setup in candidates), key=score, reverse=True)
    if storage is not None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = optuna.distributions.CategoricalDistribution([setup.name for setup in candidates])
        stored = [each for each in forecasts if each.setup == PLAIN]
        stored += [each for each in forecasts if each.setup != PLAIN][: STORED_TRIALS - 1]
        study = optuna.create_study(study_name=study_name, storage=storage, direction="maximize")
        study.add_trials(
            optuna.trial.create_trial(
                params={"setup": each.setup.name},
                distributions={"setup": names},
                value=score(each),
                user_attrs={"speedup": each.speedup.estimate},
            )
            for each in stored
        )
    return forecasts
