"""Races the finalists in paired real runs, queue by queue. The race only selects: its figures are never a proof."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from statistics import fmean

import numpy
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible
from tuner.policy.estimates import Objective
from tuner.search.pairs import Pair, Queue, columns, timed_pairs
from tuner.search.studies import Storage, store_study

PRUNE_P = 0.02  # after each queue: in a race of twelve an equal setup is pruned with a chance of 0.05
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
    """Races setups against plain decoding on the same queues, and stores the race as an Optuna study.

    Plain against plain comes first; then the best forecast of each draft, because forecasts of one draft err alike;
    then further lengths of the fastest draft. A setup that loses to the best finisher, queue by queue, stops early.
    Finishers are ranked by the ratio over all queues together.

    Args:
        run: runs a queue with plain decoding and a setup.
        hopeful: the setups to choose from, the best forecast first.
        num_finalists: how many drafts are raced.
        enough: whether the time for races is used: no further setup is raced then.
    """
    names = CategoricalDistribution([setup.name for setup in (PLAIN, *hopeful)])
    trials: list[FrozenTrial] = []
    finishers: dict[Setup, tuple[float, Mapping[int, float]]] = {}
    pruned: list[Setup] = []
    failed: list[Infeasible] = []

    def enter(setup: Setup) -> None:
        if enough():
            return
        planned = queues[:NOISE_QUEUES] if setup == PLAIN else queues
        _, rival = min(finishers.values(), key=itemgetter(0), default=(0.0, {}))
        state, total, by_queue = TrialState.COMPLETE, None, dict[int, float]()
        try:
            total, by_queue = _compare((run(queue, setup) for queue in planned), rival, objective)
        except EngineError as error:
            state = TrialState.FAIL
            failed.append(Infeasible(setup=setup, reason=type(error).__name__, detail=str(error)))
        else:
            if total is None:
                state = TrialState.PRUNED
                pruned.append(setup)
            else:
                finishers[setup] = total, by_queue
        trials.append(
            create_trial(
                state=state,
                value=total,
                params={"setup": setup.name},
                distributions={"setup": names},
                intermediate_values=by_queue,
            )
        )

    enter(PLAIN)
    best_of_draft = {setup.draft: setup for setup in reversed(hopeful)}
    finalists = [setup for setup in hopeful if best_of_draft[setup.draft] == setup][:num_finalists]
    for setup in finalists:
        enter(setup)
    if drafting := [setup for setup in finishers if setup != PLAIN]:
        fastest = min(drafting, key=lambda setup: finishers[setup][0])
        others = [setup for setup in hopeful if setup.draft == fastest.draft and setup not in finalists]
        for setup in others[:MORE_LENGTHS]:
            enter(setup)
    store_study(study_name, "minimize", trials, storage)
    noise, _ = finishers.pop(PLAIN, (None, {}))
    speedups = {setup: math.exp(-log_ratio) for setup, (log_ratio, _) in finishers.items()}
    return RaceResult(speedups=speedups, noise=noise, pruned=tuple(pruned), failed=tuple(failed))


def _compare(
    runs: Iterable[Sequence[Pair]], rival: Mapping[int, float], objective: Objective
) -> tuple[float | None, dict[int, float]]:
    """Log of a setup's over plain seconds per token, over all queues and of each: negative when it is faster.

    Over all it is None where the setup loses to the rival, or where no run has a time per token.
    """
    pairs, by_queue = list[Pair](), dict[int, float]()
    for number, ran in enumerate(runs):
        if timed := timed_pairs(ran):
            pairs += timed
            by_queue[number] = _log_ratio(timed, objective)
            if _loses(by_queue, rival):
                return None, by_queue
    return _log_ratio(pairs, objective) if pairs else None, by_queue


def _log_ratio(pairs: Sequence[Pair], objective: Objective) -> float:
    plain_s, plain_tokens, chosen_s, chosen_tokens = (sum(column) for column in columns(pairs, objective))
    return math.log((chosen_s / chosen_tokens) / (plain_s / plain_tokens))


def _loses(by_queue: Mapping[int, float], rival: Mapping[int, float]) -> bool:
    """Whether the rival is faster on the queues of both: on average, and by the signed-rank test (Wilcoxon 1945)."""
    lost = [log_ratio - rival[number] for number, log_ratio in by_queue.items() if number in rival]
    if len(lost) < PRUNE_AFTER_QUEUES or fmean(lost) <= 0.0:
        return False
    positive = sum(rank for rank, loss in enumerate(sorted(lost, key=abs), 1) if loss > 0.0)
    return bool(_rank_sums(len(lost))[positive:].sum() < PRUNE_P)


@cache
def _rank_sums(size: int) -> numpy.ndarray:
    """The chances that the ranks of the positive ones of `size` differences add up to 0, 1, 2, ... by chance."""
    chances = numpy.ones(1)
    for rank in range(1, size + 1):
        chances = numpy.convolve(chances, numpy.bincount([0, rank]) / 2.0)
    return chances
