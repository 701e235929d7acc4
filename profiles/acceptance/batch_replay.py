"""A queue of prompts replayed over their traces, several rows at a time: what a batch would run, without a model.

Rows advance by their own acceptance while a round costs the widest row. Exact for greedy decoding; of sampled decoding
it is one way, drawn per prompt. The order of events is that of `profiles.engines.torch.decoder.Decoder`.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from profiles.acceptance.expected_rounds import DraftAcceptance, RoundOutcome, catch_up_width, round_outcomes
from profiles.engines.base import TORCH, EngineCapabilities
from profiles.records.evidence import StepShape, TargetTrace

PLAIN_ROUND = RoundOutcome(proposed=0, accepted=0, prob=1.0, by_model=False)


def draw_rounds(
    trace: TargetTrace, acceptance: DraftAcceptance | None, length: int, max_new_tokens: int, *, rng: random.Random
) -> list[RoundOutcome]:
    """One way through a trace; the only one when every accept_prob is 0 or 1.

    A round drafts no more than the output still needs of `max_new_tokens`; with `NO_END` its full length.
    """
    size = len(trace.token_ids)
    rounds: list[RoundOutcome] = []
    start = 1
    while start < size:
        outcome = PLAIN_ROUND
        if acceptance is not None:
            outcomes = list(round_outcomes(acceptance, start, min(length, max_new_tokens - start - 1), size))
            outcome = draw_outcome(outcomes, rng)
        rounds.append(outcome)
        start += outcome.accepted + 1
    return rounds


def draw_outcome(outcomes: Sequence[RoundOutcome], rng: random.Random) -> RoundOutcome:
    """One of the ways a round can go; nothing is drawn where there is only one."""
    return outcomes[0] if len(outcomes) == 1 else rng.choices(outcomes, [outcome.prob for outcome in outcomes])[0]


@dataclass(slots=True, kw_only=True)
class PromptReplay:
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
    queue: Sequence[list[RoundOutcome]], batch_size: int, capabilities: EngineCapabilities = TORCH
) -> list[PromptReplay]:
    """What a batch runs for every prompt of the queue, in its order.

    In continuous batching a round counts as wide as its mean row, and when the queue is empty it starts over until the
    last of its prompts is done (see `EngineCapabilities.batching`).
    """
    runs = [PromptReplay(rounds=rounds) for rounds in queue]
    continuous = capabilities.batching == "continuous"
    starts_over = continuous and batch_size > 1
    waiting = itertools.chain(
        runs, (PromptReplay(rounds=rounds) for rounds in itertools.cycle(queue if starts_over else ()))
    )
    active: list[PromptReplay] = []
    while True:
        _refill(active, waiting, batch_size, continuous=continuous)
        if all(run.is_done for run in runs):
            return runs
        _run_round(active, continuous=continuous)
        active = [run for run in active if not run.is_done]


def _refill(active: list[PromptReplay], waiting: Iterator[PromptReplay], batch_size: int, *, continuous: bool) -> None:
    before = list(active)
    while len(active) < batch_size and (run := next(waiting, None)) is not None:
        for other in before if continuous else active:
            other.refills += 1
        if not run.is_done:  # an output of one token frees its row at once
            active.append(run)


def _run_round(active: list[PromptReplay], *, continuous: bool) -> None:
    outcomes = [run.rounds[run.next_round] for run in active]
    by_model = [(run, outcome) for run, outcome in zip(active, outcomes, strict=True) if outcome.by_model]
    draft_steps = max((outcome.proposed for _, outcome in by_model), default=0)
    first_width = catch_up_width(max(run.behind for run, _ in by_model)) if by_model else 0
    proposed = [outcome.proposed for outcome in outcomes]
    drafted = round(sum(proposed) / len(proposed)) if continuous else max(proposed)
    shape = StepShape(drafted + 1, draft_steps, first_width)
    for run, outcome in zip(active, outcomes, strict=True):
        run.shapes[shape] += 1
        before = 0 if by_model and run.behind <= first_width else run.behind
        taken_in = min(outcome.accepted, draft_steps - 1) if outcome.by_model else 0
        run.behind = before + outcome.accepted + 1 - taken_in
        run.next_round += 1
