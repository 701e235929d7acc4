"""A queue of prompts replayed over their traces, several rows at a time: what a batch would run, without a model.

Rows advance by their own acceptance while a round costs the widest row. Exact for greedy decoding; a sampled draft's
luck is drawn once per prompt. The order of events is that of `decoding.Decoder`. Arithmetic on records.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from profiles.acceptance.expected_rounds import Replayed, RoundOutcome, catch_up_width, round_outcomes
from profiles.engines.base import TORCH, EngineCapabilities
from profiles.records.evidence import RoundCount, StepShape, TargetTrace

PLAIN_ROUND = RoundOutcome(proposed=0, accepted=0, share=1.0, by_model=False)


def rounds_of(
    trace: TargetTrace, acceptance: Replayed | None, length: int, max_new_tokens: int, luck: random.Random
) -> list[RoundOutcome]:
    """One way through a trace; the only one when every keep probability is 0 or 1.

    A round drafts no more than `max_new_tokens` leave room for; `NO_END` leaves all.
    """
    size = len(trace.token_ids)
    rounds: list[RoundOutcome] = []
    start = 1
    while start < size:
        outcome = PLAIN_ROUND
        if acceptance is not None:
            ways = list(round_outcomes(acceptance, start, min(length, max_new_tokens - start - 1), size))
            outcome = ways[0] if len(ways) == 1 else luck.choices(ways, [way.share for way in ways])[0]
        rounds.append(outcome)
        start += outcome.accepted + 1
    return rounds


def greedy_rounds(kept: Sequence[bool], length: int) -> list[RoundCount]:
    """(proposed, accepted) of the rounds that a greedy draft goes through where its choices are `kept` or not."""
    rounds, start = [], 0
    while start < len(kept):
        proposed = min(length, len(kept) - start)
        accepted = next((ahead for ahead in range(proposed) if not kept[start + ahead]), proposed)
        rounds.append(RoundCount(proposed, accepted))
        start += accepted + 1
    return rounds


@dataclass(slots=True, kw_only=True)
class Replay:
    """One prompt in the queue: its rounds, and what the batch ran while it was in it (see `Sample`)."""

    rounds: list[RoundOutcome]
    shapes: Counter[StepShape] = field(default_factory=Counter)
    refills: int = 0
    behind: int = 1
    next_round: int = 0

    @property
    def is_done(self) -> bool:
        return self.next_round == len(self.rounds)


def replay(
    queue: Sequence[list[RoundOutcome]], batch_size: int, properties: EngineCapabilities = TORCH
) -> list[Replay]:
    """What a batch runs for every prompt of the queue, in its order.

    In continuous batching a round counts as wide as its mean row, and when the queue is empty it goes round again until
    the last of its prompts is done (`EngineCapabilities.batching`).
    """
    runs = [Replay(rounds=rounds) for rounds in queue]
    continuous = properties.batching == "continuous"
    again = (Replay(rounds=rounds) for rounds in itertools.cycle(queue)) if continuous and batch_size > 1 else iter(())
    waiting = itertools.chain(runs, again)
    active: list[Replay] = []
    while True:
        _refill(active, waiting, batch_size, continuous=continuous)
        if all(run.is_done for run in runs):
            return runs
        _run_round(active, continuous=continuous)
        active = [run for run in active if not run.is_done]


def _refill(active: list[Replay], waiting: Iterator[Replay], batch_size: int, *, continuous: bool) -> None:
    before = list(active)
    while len(active) < batch_size and (run := next(waiting, None)) is not None:
        for other in before if continuous else active:
            other.refills += 1
        if not run.is_done:  # an output of one token makes room at once
            active.append(run)


def _run_round(active: list[Replay], *, continuous: bool) -> None:
    outcomes = [run.rounds[run.next_round] for run in active]
    asking = [(run, outcome) for run, outcome in zip(active, outcomes, strict=True) if outcome.by_model]
    steps = max((outcome.proposed for _, outcome in asking), default=0)
    width = catch_up_width(max(run.behind for run, _ in asking)) if asking else 0
    proposed = [outcome.proposed for outcome in outcomes]
    mean_or_widest = round(sum(proposed) / len(proposed)) if continuous else max(proposed)
    shape = StepShape(mean_or_widest + 1, steps, width)
    for run, outcome in zip(active, outcomes, strict=True):
        run.shapes[shape] += 1
        before = 0 if asking and run.behind <= width else run.behind
        taken_in = min(outcome.accepted, steps - 1) if outcome.by_model else 0
        run.behind = before + outcome.accepted + 1 - taken_in
        run.next_round += 1
