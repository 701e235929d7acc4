"""The search over forecasts as an Optuna study, and the storage that keeps studies for optuna-dashboard.

Evidence is never read back from studies.
"""

import contextlib
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import optuna

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import StoreError
from tuner.policy.estimates import Forecast
from tuner.search.objective import score

MAX_EXHAUSTIVE = 2000  # candidates that are all tried; larger spaces are searched
TPE_TRIALS = 400
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
    """Forecasts the candidates, best score first.

    A small space is tried exhaustively, a large one searched by TPE with a fixed seed; plain decoding always comes
    first. The search runs in memory; its best 100 trials are then stored under `study_name`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_draft: dict[str, dict[int, Setup]] = {}
    for setup in candidates:
        if setup.draft is not None:
            by_draft.setdefault(setup.draft.name, {})[setup.length] = setup
    forecasts: dict[Setup, Forecast] = {}

    def objective(trial: optuna.Trial) -> float:
        draft = trial.suggest_categorical("draft", ["plain", *by_draft])
        setup = PLAIN
        if draft != "plain":
            lengths = sorted(by_draft[draft])
            setup = by_draft[draft][trial.suggest_categorical(f"length {draft}", lengths)]
        forecasts[setup] = forecast(setup)
        trial.set_user_attr("setup", setup.name)
        trial.set_user_attr("speedup", forecasts[setup].speedup.estimate)
        return score(forecasts[setup])

    exhaustive = len(candidates) <= MAX_EXHAUSTIVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.BruteForceSampler(seed=0) if exhaustive else optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({"draft": "plain"})
    study.optimize(objective, n_trials=None if exhaustive else TPE_TRIALS)
    if storage is not None:
        best = sorted(study.trials, key=lambda trial: -(trial.value or 0.0))[:STORED_TRIALS]
        stored = optuna.create_study(study_name=study_name, storage=storage, direction="maximize")
        stored.add_trials(sorted(best, key=lambda trial: trial.number))
    return sorted(forecasts.values(), key=score, reverse=True)
