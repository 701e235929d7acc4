"""Split from profiles.stats."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from profiles.records.core import CATCH_UP_WIDTHS
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.evidence import Acceptance, AcceptanceTrace, LookupTrace, RoundCount, StepShape, TargetTrace

WIDEST_CATCH_UP = CATCH_UP_WIDTHS[-1]


NO_END = sys.maxsize  # new tokens, for an engine whose rounds take no notice of how many are still wanted


def catch_up_width(behind: int) -> int:
    """How wide a draft model's first step of a round is when it is `behind` tokens behind: 2, 4, ... 64, 128, 192, ...

    A few widths, so that every one is timed and, on a GPU, captured; past 64 tokens several steps of 64 take their
    turn.
    """
    for width in CATCH_UP_WIDTHS:
        if behind <= width:
            return width
    return -(-behind // WIDEST_CATCH_UP) * WIDEST_CATCH_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeAcceptance:
    """A composite draft over one target trace: a round asks the model where the look-up finds nothing."""

    lookup: LookupTrace
    model: AcceptanceTrace


Replayed = Acceptance | CompositeAcceptance


def joined(parts: Sequence[Acceptance]) -> Replayed:
    """What a draft's parts accept, together: a look-up and a model make a composite, one part stands for itself."""
    match list(parts):
        case [LookupTrace() as lookup, AcceptanceTrace() as model]:
            return CompositeAcceptance(lookup=lookup, model=model)
        case [LookupTrace() | AcceptanceTrace() as alone]:
            return alone
    raise InputError(f"{len(parts)} acceptance records: one, or a look-up's and a model's are allowed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCounts:
    """The rounds of one sequence alone in its batch: expected counts of each outcome and of each step shape."""

    rounds: Mapping[RoundCount, float]
    shapes: Mapping[StepShape, float]

    @property
    def num_rounds(self) -> float:
        return sum(self.rounds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """One way a round can go: its probability, and whether the draft model was asked."""

    proposed: int
    accepted: int
    share: float
    by_model: bool

    def behind(self, before: int) -> int:
        """Tokens the draft model is behind afterwards; its last proposal is never taken in by itself."""
        if not self.by_model:
            return before + self.accepted + 1
        return 2 if self.accepted == self.proposed else 1


def expected_rounds(
    trace: TargetTrace, acceptance: Replayed | None, length: int, max_new_tokens: int, *, past_end: bool = False
) -> RoundCounts:
    """The rounds the engine would go through, in expectation over the draft's luck given the emitted tokens.

    Exact for greedy decoding, where every keep probability is 0 or 1. A forward pass over (start, tokens behind)
    states of the recursion in Leviathan et al. 2023, conditional on the trace. Token 0 comes from the prefill; a round
    drafts at most `max_new_tokens - generated - 1`; an accepted end token ends it with no target token. `acceptance`
    None is plain decoding.

    `past_end`: an engine's rounds draft their full length whatever room is left, and count what they accept beyond
    `max_new_tokens`: as many tokens of that as the trace is longer are counted here.

    Raises: NotMeasuredError: the look-up trace is shorter than `length`. InputError: a draft with length 0.
    """
    size = len(trace.token_ids)
    emitted = min(size, max_new_tokens) if past_end else size
    if acceptance is None:
        if emitted == 1:
            return RoundCounts(rounds={}, shapes={})
        return RoundCounts(rounds={RoundCount(0, 0): float(emitted - 1)}, shapes={StepShape(1): float(emitted - 1)})
    check_length(acceptance, length)
    states: list[dict[int, float]] = [{} for _ in range(size + 1)]
    states[min(1, size)] = {1: 1.0}
    rounds: dict[RoundCount, float] = {}
    shapes: dict[StepShape, float] = {}
    for start in range(1, emitted):
        asked = min(length, (NO_END if past_end else max_new_tokens) - start - 1)
        outcomes = list(round_outcomes(acceptance, start, asked, size)) if states[start] else []
        for (behind, mass), outcome in itertools.product(states[start].items(), outcomes):
            weight = mass * outcome.share
            counted = RoundCount(outcome.proposed, outcome.accepted)
            rounds[counted] = rounds.get(counted, 0.0) + weight
            steps = (outcome.proposed, catch_up_width(behind)) if outcome.by_model else ()
            shape = StepShape(outcome.proposed + 1, *steps)
            shapes[shape] = shapes.get(shape, 0.0) + weight
            following = states[min(start + outcome.accepted + 1, size)]
            after = outcome.behind(behind) if isinstance(acceptance, CompositeAcceptance) else 1
            following[after] = following.get(after, 0.0) + weight
    return RoundCounts(rounds=dict(sorted(rounds.items())), shapes=dict(sorted(shapes.items())))


def check_length(acceptance: Replayed, length: int) -> None:
    """Raises: NotMeasuredError: the look-up trace is shorter than `length`. InputError: a draft with length 0."""
    if length < 1:
        raise InputError(f"speculation length {length}: at least 1 is needed with a draft")
    lookup = acceptance.lookup if isinstance(acceptance, CompositeAcceptance) else acceptance
    if isinstance(lookup, LookupTrace) and lookup.max_length < length:
        raise NotMeasuredError(f"look-up measured for lengths up to {lookup.max_length}, not {length}")


def round_outcomes(acceptance: Replayed, start: int, asked: int, size: int) -> Iterator[RoundOutcome]:
    """How a round that starts at `start` of `size` tokens and may draft `asked` tokens can go."""
    if asked <= 0:
        yield RoundOutcome(proposed=0, accepted=0, share=1.0, by_model=False)
        return
    if isinstance(acceptance, CompositeAcceptance):
        acceptance = acceptance.lookup if acceptance.lookup.proposed[start] > 0 else acceptance.model
    if isinstance(acceptance, LookupTrace):
        proposed = min(asked, acceptance.proposed[start])
        yield RoundOutcome(
            proposed=proposed, accepted=min(proposed, acceptance.accepted[start]), share=1.0, by_model=False
        )
        return
    survival = 1.0
    most = min(asked, size - start)  # past an accepted end token nothing is kept
    for accepted in range(most):
        keep = acceptance.accept_probs[start + accepted]
        if keep < 1.0:
            yield RoundOutcome(proposed=asked, accepted=accepted, share=survival * (1.0 - keep), by_model=True)
        survival *= keep
        if survival == 0.0:
            return
    yield RoundOutcome(proposed=asked, accepted=most, share=survival, by_model=True)
