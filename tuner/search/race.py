"""Split from tuner.search.studies."""

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import optuna

from profiles.acceptance.rates import tpot_s
from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible, Sample
from profiles.records.keys import queue_digest
from tuner.search.objective import among_equals
from tuner.search.studies import Storage, _kept

PRUNE_P = 0.1


PRUNE_AFTER_STEPS = 4


NOISE_QUEUES = 6  # plain against plain needs no more to show the noise floor


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


def run_pairs(engine: Engine, workload: Workload, queue: Queue, setup: Setup, purpose: str) -> list[Pair]:
    """(plain, setup) of every prompt of a queue, the two run back to back in their drawn order."""
    order = pair_order(workload, queue, setup)
    samples = engine.run_together(workload, queue, order, purpose)
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
