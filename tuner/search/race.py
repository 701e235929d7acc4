"""Races the finalists in paired real runs, queue by queue. The race only selects: its figures are never a proof."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

import numpy
from optuna.trial import FrozenTrial, TrialState, create_trial

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible
from tuner.policy.estimates import Objective
from tuner.search.pairs import Pair, columns, timed_pairs
from tuner.search.studies import Storage, params_of, space_of, store_study

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


Runs = Mapping[Setup, Sequence[Pair]]


def race(
    run: Callable[[int, Sequence[Setup]], Runs],
    num_queues: int,
    hopeful: Sequence[Setup],
    *,
    num_finalists: int,
    study_name: str,
    storage: Storage | None,
    objective: Objective = "tpot",
    enough: Callable[[], bool] = lambda: False,
    more_lengths: Callable[[Setup], bool] = lambda _: True,
) -> RaceResult:
    """Races setups against plain decoding on the same queues, and stores the race as an Optuna study.

    The best forecast of each draft comes first, because forecasts of one draft err alike, all of them beside one plain
    run of each queue, and plain decoding once more; then `more_lengths` of the fastest draft. A setup that loses to
    the fastest, queue by queue, stops early. Finishers are ranked by the ratio over all queues together.

    Args:
        run: runs a queue, told by its number, with plain decoding and with setups.
        hopeful: the setups to choose from, the best forecast first.
        num_finalists: how many drafts are raced.
        enough: whether the time for races is used: none begins then, and one under way ends after four queues, or half
            of a batch's.
        more_lengths: whether further lengths are raced of the draft of this setup, the fastest one.
    """
    contest = _Race(run, num_queues, objective, enough)
    best_of_draft = {setup.draft: setup for setup in reversed(hopeful)}
    finalists = [setup for setup in hopeful if best_of_draft[setup.draft] == setup][:num_finalists]
    contest.race((PLAIN, *finalists))
    fastest = contest.fastest()
    if fastest is not None and more_lengths(fastest):
        others = [setup for setup in hopeful if setup.draft == fastest.draft and setup not in finalists]
        contest.race(others[:MORE_LENGTHS])
    entries = contest.entries
    store_study(study_name, "minimize", _trials(entries, objective), storage)
    totals = {setup: each.total(objective) for setup, each in entries.items() if each.state == TrialState.COMPLETE}
    noise = totals.pop(PLAIN, None)
    return RaceResult(
        speedups={setup: math.exp(-total) for setup, total in totals.items()},
        noise=noise,
        pruned=tuple(setup for setup, entry in entries.items() if setup != PLAIN and entry.state == TrialState.PRUNED),
        failed=tuple(entry.failure for entry in entries.values() if entry.failure is not None),
    )


@dataclass(slots=True)
class _Entry:
    """What a setup ran so far: `by_queue` are logs of its over plain seconds per token, negative when it is faster."""

    pairs: list[Pair] = field(default_factory=list)
    by_queue: dict[int, float] = field(default_factory=dict)
    state: TrialState = TrialState.COMPLETE
    failure: Infeasible | None = None

    def add(self, number: int, pairs: Sequence[Pair], objective: Objective) -> None:
        if timed := timed_pairs(pairs):
            self.pairs += timed
            self.by_queue[number] = _log_ratio(timed, objective)

    def total(self, objective: Objective) -> float:
        """The log ratio over all queues together; 0 before the first."""
        return _log_ratio(self.pairs, objective) if self.pairs else 0.0


@dataclass(slots=True)
class _Race:
    """Runs setups queue by queue; `entries` are what came of them."""

    run: Callable[[int, Sequence[Setup]], Runs]
    num_queues: int
    objective: Objective
    enough: Callable[[], bool]
    entries: dict[Setup, _Entry] = field(default_factory=dict)

    def race(self, setups: Sequence[Setup]) -> None:
        """Races setups together. Plain decoding, where it is among them, runs again in the first queues only."""
        if not setups or self.enough():
            return
        new = {setup: _Entry() for setup in setups}
        self.entries |= new
        min_queues = min(PRUNE_AFTER_QUEUES, self.num_queues // 2)
        for number in range(self.num_queues):
            running = [setup for setup, entry in new.items() if entry.state == TrialState.COMPLETE]
            drafting = [setup for setup in running if setup != PLAIN]
            if not drafting or (number >= min_queues and self.enough()):
                break
            for setup, pairs in self._run(number, running if number < NOISE_QUEUES else drafting).items():
                new[setup].add(number, pairs, self.objective)
            rival = self._rival()
            for setup in drafting:
                if _loses(new[setup].by_queue, rival):
                    new[setup].state = TrialState.PRUNED
        for entry in new.values():
            if entry.state == TrialState.COMPLETE and not entry.pairs:  # no run had a time per token
                entry.state = TrialState.PRUNED

    def fastest(self) -> Setup | None:
        """The fastest setup that drafts so far; None before the first time per token."""
        totals = {
            setup: entry.total(self.objective)
            for setup, entry in self.entries.items()
            if setup != PLAIN and entry.state == TrialState.COMPLETE and entry.pairs
        }
        return min(totals, key=lambda setup: totals[setup], default=None)

    def _rival(self) -> Mapping[int, float]:
        """By queue, of the fastest setup so far; plain decoding is 0 everywhere."""
        fastest = self.fastest()
        if fastest is None or self.entries[fastest].total(self.objective) >= 0.0:
            return dict.fromkeys(range(self.num_queues), 0.0)
        return self.entries[fastest].by_queue

    def _run(self, number: int, setups: Sequence[Setup]) -> Runs:
        """Runs of all setups together; where that fails each alone, so that only the one at fault is left out."""
        try:
            return self.run(number, setups)
        except EngineError as error:
            if len(setups) > 1:
                alone = [self._run(number, (setup,)) for setup in setups]
                return {setup: pairs for ran in alone for setup, pairs in ran.items()}
            entry = self.entries[setups[0]]
            entry.state = TrialState.FAIL
            entry.failure = Infeasible(setup=setups[0], reason=type(error).__name__, detail=str(error))
            return {}


def _trials(entries: Mapping[Setup, _Entry], objective: Objective) -> list[FrozenTrial]:
    space = space_of(entries)
    return [
        create_trial(
            state=entry.state,
            value=entry.total(objective) if entry.state == TrialState.COMPLETE else None,
            params=params_of(setup),
            distributions=space,
            user_attrs={"setup": setup.name},
            intermediate_values=entry.by_queue,
        )
        for setup, entry in entries.items()
    ]


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
