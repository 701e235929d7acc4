"""The two Optuna studies: one over forecasts, one that races the finalists in paired real runs.

The only module that imports Optuna. Studies are kept in an Optuna storage of their own (optuna-dashboard opens it);
evidence itself is never read back from there.
"""

import contextlib
import math
import random
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import optuna

from profiles.errors import EngineError, StoreError
from profiles.formulas import tpot_s
from profiles.keys import queue_digest
from profiles.protocol import Engine
from profiles.terms import PLAIN, Infeasible, Prompt, Sample, Setup, Workload
from tuner.claims import Forecast
from tuner.objective import among_equals, score

EXHAUST_UP_TO = 2000
TPE_TRIALS = 400
KEPT_TRIALS = 100
PRUNE_P = 0.1
PRUNE_AFTER_STEPS = 4
BUSY_TIMEOUT_S = 30.0  # other runs may write to the same studies
NOISE_QUEUES = 6  # plain against plain needs no more to show the noise floor

Storage: TypeAlias = optuna.storages.BaseStorage
Pair: TypeAlias = tuple[Sample, Sample]  # plain decoding, a setup
Queue: TypeAlias = tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What the race saw: geometric-mean speed-up of every finalist that finished, and the winner.

    `noise` is the mean log ratio of plain against plain: how far from 0 nothing at all comes out.
    """

    speedups: dict[Setup, float]
    noise: float | None
    pruned: tuple[Setup, ...]
    failed: tuple[Infeasible, ...]
    winner: Setup | None


@contextlib.contextmanager
def _kept(what: str, next_step: str) -> Iterator[None]:
    """Turns what Optuna raises when its database fails into one line; evidence is not in it."""
    try:
        yield
    except (sqlite3.Error, optuna.exceptions.StorageInternalError, optuna.exceptions.DuplicatedStudyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StoreError(f"{what}: {reason}; {next_step}, no evidence is in it") from error


def open_storage(place: Path | str, name: str = "") -> Storage:
    """Optuna's own database, made where there is none: a SQLite file, or a URL, which errors call `name`.

    Optuna makes its tables unguarded, so the caller keeps other processes out meanwhile.
    Raises StoreError: not Optuna's, newer, or not to be opened.
    """
    called = name or place
    url, driver_options = str(place), {}
    if isinstance(place, Path):
        with _kept(f"studies {called}", "move the file away"), contextlib.closing(sqlite3.connect(place)) as connection:
            connection.execute("PRAGMA schema_version")  # Optuna lets SQLAlchemy's errors through when it opens a file
        url, driver_options = f"sqlite:///{place}", {"timeout": BUSY_TIMEOUT_S}
    with _kept(f"studies {called}", "move the file away" if isinstance(place, Path) else "drop its schema"):
        try:
            engine_options = {"pool_pre_ping": True, "connect_args": driver_options}
            storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_options)
        except RuntimeError as error:
            raise StoreError(f"studies {called}: {error}") from error
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


def log_ratio(pairs: Sequence[Pair]) -> float | None:
    """Log of the setup's over plain seconds per token, over all pairs: negative when the setup is faster.

    None without a pair whose outputs have a second token.
    """
    timed = [pair for pair in pairs if all(tpot_s(sample) for sample in pair)]
    if not timed:
        return None
    plain_s, chosen_s = (
        sum(pair[side].decode_s for pair in timed) / sum(pair[side].output_tokens - 1 for pair in timed)
        for side in (0, 1)
    )
    return math.log(chosen_s / plain_s)


def pair_order(workload: Workload, queue: Queue, setup: Setup) -> tuple[Setup, Setup]:
    """Plain decoding and the setup in an order drawn from seed, prompts and setup: random, but a rerun repeats it."""
    plain_first = random.Random(f"{workload.seed}/{queue_digest(queue)}/{setup.digest}").random() < 0.5
    return (PLAIN, setup) if plain_first else (setup, PLAIN)


def run_pairs(engine: Engine, workload: Workload, queue: Queue, setup: Setup, occasion: str) -> list[Pair]:
    """(plain, setup) of every prompt of a queue, the two run back to back in their drawn order."""
    order = pair_order(workload, queue, setup)
    samples = engine.run_together(workload, queue, order, occasion)
    first, second = samples[: len(queue)], samples[len(queue) :]
    return list(zip(first, second, strict=True) if order[0] == PLAIN else zip(second, first, strict=True))


@_kept("Optuna's studies", "run again")
def race(
    run: Callable[[Queue, Setup], Sequence[Pair]],
    queues: Sequence[Queue],
    finalists: Sequence[Setup],
    name: str,
    storage: Storage | None,
) -> Race:
    """Study 2: trial 0 is plain against plain, then one trial per finalist; step i is queue i, paired.

    The reported value is the log ratio of seconds per token; `WilcoxonPruner` stops a trial that loses, queue by
    queue, to the best finished one. A finalist that fails is listed. The race only selects: it never counts as proof.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=PRUNE_P, n_startup_steps=PRUNE_AFTER_STEPS)
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", pruner=pruner)
    names = optuna.distributions.CategoricalDistribution([setup.name for setup in (PLAIN, *finalists)])
    means: dict[Setup, float] = {}
    pruned: list[Setup] = []
    failed: list[Infeasible] = []
    for setup in (PLAIN, *finalists):
        study.enqueue_trial({"setup": setup.name})
        trial = study.ask({"setup": names})
        try:
            mean = _run_trial(trial, run, queues if setup != PLAIN else queues[:NOISE_QUEUES], setup)
        except EngineError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            failed.append(Infeasible(setup=setup, reason=type(error).__name__, detail=str(error)))
            continue
        if mean is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            pruned.append(setup)
        else:
            study.tell(trial, mean)
            means[setup] = mean
    noise = means.pop(PLAIN, None)
    speedups = {setup: math.exp(-mean) for setup, mean in means.items()}
    return Race(
        speedups=speedups, noise=noise, pruned=tuple(pruned), failed=tuple(failed), winner=among_equals(speedups)
    )


def _run_trial(
    trial: optuna.Trial,
    run: Callable[[Queue, Setup], Sequence[Pair]],
    queues: Sequence[Queue],
    setup: Setup,
) -> float | None:
    """Mean log ratio over the queues; None when it was pruned or no run had a time per token."""
    ratios: list[float] = []
    for step, queue in enumerate(queues):
        ratio = log_ratio(run(queue, setup))
        if ratio is None:
            continue
        ratios.append(ratio)
        trial.report(ratio, step)
        if setup != PLAIN and _is_losing(trial):
            return None
    return sum(ratios) / len(ratios) if ratios else None


def _is_losing(trial: optuna.Trial) -> bool:
    with warnings.catch_warnings():
        # plain against plain has fewer steps than the finalists: those they share are compared, which is meant
        warnings.filterwarnings("ignore", message="WilcoxonPruner finds steps", category=UserWarning)
        return bool(trial.should_prune())
