"""Races the finalists in paired real runs, queue by queue. The race only selects: its figures are never a proof."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible
from tuner.policy.estimates import Objective
from tuner.search.pairs import Pair, Queue, columns, timed_pairs
from tuner.search.studies import Storage, store_study

PRUNE_P = 0.05
PRUNE_AFTER_QUEUES = 4
MORE_LENGTHS = 2  # of the fastest draft, that are raced once it is known
NOISE_QUEUES = 6  # plain against plain needs no more to show the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceResult:
    """What a race measured.

    `speedups` are ratios of totals, as in the proof, of the finalists that finished. `noise` is the log ratio of plain
    against plain, which would be 0 without noise. `failed` are finalists that an engine could not run.
    """

    speedups: dict[Setup, float]
    noise: float | None
    pruned: tuple[Setup, ...]
    failed: tuple[Infeasible, ...]


def race(
    run: Callable[[Queue, Setup], Sequence[Pair]],
    queues: Sequence[Queue],
    hopeful: Sequence[Setup],
    *,
    num_finalists: int,
    study_name: str,
    storage: Storage | None,
    objective: Objective = "tpot",
    enough: Callable[[], bool] = lambda: False,
) -> RaceResult:
    """Races setups against plain decoding on the same queues, as one Optuna study.

    Plain against plain comes first; then the best forecast of each draft, because forecasts of one draft err alike;
    then further lengths of the fastest draft. A trial reports the log ratio of seconds per token of each queue, by
    which `WilcoxonPruner` stops a setup that loses, queue by queue, to the best that finished. Finishers are ranked by
    the ratio over all queues together.

    Args:
        run: runs a queue with plain decoding and a setup.
        hopeful: the setups to choose from, the best forecast first.
        num_finalists: how many drafts are raced.
        enough: whether the time for races is used: no further setup is raced then.
    """
    study = _create_study()  # in memory: a lost database never ends a race
    setup_names = optuna.distributions.CategoricalDistribution([setup.name for setup in (PLAIN, *hopeful)])
    log_ratios: dict[Setup, float] = {}
    pruned: list[Setup] = []
    failed: list[Infeasible] = []

    def enter(setup: Setup) -> None:
        if enough():
            return
        study.enqueue_trial({"setup": setup.name})
        trial = study.ask({"setup": setup_names})
        try:
            planned = queues[:NOISE_QUEUES] if setup == PLAIN else queues
            log_ratio = _run_trial(trial, run, planned, setup, objective=objective)
        except EngineError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            failed.append(Infeasible(setup=setup, reason=type(error).__name__, detail=str(error)))
            return
        if log_ratio is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            pruned.append(setup)
        else:
            study.tell(trial, log_ratio)
            log_ratios[setup] = log_ratio

    enter(PLAIN)
    noise = log_ratios.pop(PLAIN, None)
    best_of_draft = {setup.draft: setup for setup in reversed(hopeful)}
    finalists = [setup for setup in hopeful if best_of_draft[setup.draft] == setup][:num_finalists]
    for setup in finalists:
        enter(setup)
    if log_ratios:
        fastest = min(log_ratios, key=lambda setup: log_ratios[setup])
        others = [setup for setup in hopeful if setup.draft == fastest.draft and setup not in finalists]
        for setup in others[:MORE_LENGTHS]:
            enter(setup)
    store_study(study_name, "minimize", study.trials, storage)
    speedups = {setup: math.exp(-log_ratio) for setup, log_ratio in log_ratios.items()}
    return RaceResult(speedups=speedups, noise=noise, pruned=tuple(pruned), failed=tuple(failed))


def _create_study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=PRUNE_P, n_startup_steps=PRUNE_AFTER_QUEUES)
    return optuna.create_study(direction="minimize", pruner=pruner)


def _run_trial(
    trial: optuna.Trial,
    run: Callable[[Queue, Setup], Sequence[Pair]],
    queues: Sequence[Queue],
    setup: Setup,
    *,
    objective: Objective,
) -> float | None:
    """Log ratio over all queues; None when the trial was pruned or no run had a time per token."""
    pairs: list[Pair] = []
    for step, queue in enumerate(queues):
        timed = timed_pairs(run(queue, setup))
        if not timed:
            continue
        pairs += timed
        trial.report(_log_ratio(timed, objective), step)
        if setup != PLAIN and _should_prune(trial):
            return None
    return _log_ratio(pairs, objective) if pairs else None


def _log_ratio(pairs: Sequence[Pair], objective: Objective) -> float:
    """Log of the setup's over plain seconds per token, over all pairs: negative when the setup is faster."""
    (plain_s,), (plain_tokens,), (chosen_s,), (chosen_tokens,) = columns([pairs], objective)
    return math.log((chosen_s / chosen_tokens) / (plain_s / plain_tokens))


def _should_prune(trial: optuna.Trial) -> bool:
    with warnings.catch_warnings():
        # plain against plain has fewer steps than the finalists: the shared ones are compared, as intended
        warnings.filterwarnings("ignore", message="WilcoxonPruner finds steps", category=UserWarning)
        return bool(trial.should_prune())
