"""The two Optuna studies: one over forecasts, one that races the finalists in paired real runs.

The only module that imports Optuna. Studies are kept in an Optuna storage of their own (optuna-dashboard opens it);
evidence itself is never read back from there.
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

EXHAUST_UP_TO = 2000


TPE_TRIALS = 400


KEPT_TRIALS = 100


BUSY_TIMEOUT_S = 30.0  # other runs may write to the same studies


Storage: TypeAlias = optuna.storages.BaseStorage


@contextlib.contextmanager
def _kept(what: str, next_step: str) -> Iterator[None]:
    """Turns what Optuna raises when its database fails into one line; evidence is not in it."""
    try:
        yield
    except (sqlite3.Error, optuna.exceptions.StorageInternalError, optuna.exceptions.DuplicatedStudyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StoreError(f"{what}: {reason}; {next_step}, no evidence is in it") from error


def open_storage(place: Path | str, name: str = "", engine_options: Mapping[str, Any] | None = None) -> Storage:
    """Optuna's own database, made where there is none: a SQLite file, or a URL, which errors call `name`.

    `engine_options` are SQLAlchemy's. Optuna makes its tables unguarded, so the caller keeps other processes out.
    Raises StoreError: not Optuna's, newer, or not to be opened.
    """
    called, next_step = (
        f"studies {name or place}",
        "move the file away" if isinstance(place, Path) else "drop its schema",
    )
    with _kept(called, next_step):
        options = dict(engine_options or {})
        if isinstance(place, Path):
            with contextlib.closing(sqlite3.connect(place)) as connection:
                connection.execute("PRAGMA schema_version")  # Optuna lets SQLAlchemy's errors through at opening
            options["connect_args"] = {"timeout": BUSY_TIMEOUT_S}
        try:
            url = f"sqlite:///{place}" if isinstance(place, Path) else place
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        except RuntimeError as error:
            raise StoreError(f"{called}: {error}") from error
        storage.get_all_studies()
    return storage


@_kept("Optuna's studies", "run again")
def search_forecasts(
    candidates: Sequence[Setup], forecast: Callable[[Setup], Forecast], name: str, storage: Storage | None
) -> list[Forecast]:
    """Study 1: the forecasts searched, best score first; plain decoding is always enqueued first.

    A small space is exhausted, a large one searched by TPE with a fixed seed. The search runs in memory; the best
    100 trials are then kept in `storage` under `name`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_draft: dict[str, dict[int, Setup]] = {}
    for setup in candidates:
        if setup.draft is not None:
            by_draft.setdefault(setup.draft.name, {})[setup.length] = setup
    found: dict[Setup, Forecast] = {}

    def objective(trial: optuna.Trial) -> float:
        draft = trial.suggest_categorical("draft", ["plain", *by_draft])
        setup = PLAIN
        if draft != "plain":
            lengths = sorted(by_draft[draft])
            setup = by_draft[draft][trial.suggest_categorical(f"length {draft}", lengths)]
        found[setup] = forecast(setup)
        trial.set_user_attr("setup", setup.name)
        trial.set_user_attr("speedup", found[setup].speedup.estimate)
        return score(found[setup])

    exhaust = len(candidates) <= EXHAUST_UP_TO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.BruteForceSampler(seed=0) if exhaust else optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({"draft": "plain"})
    study.optimize(objective, n_trials=None if exhaust else TPE_TRIALS)
    if storage is not None:
        best = sorted(study.trials, key=lambda trial: -(trial.value or 0.0))[:KEPT_TRIALS]
        kept = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        kept.add_trials(sorted(best, key=lambda trial: trial.number))
    return sorted(found.values(), key=score, reverse=True)
