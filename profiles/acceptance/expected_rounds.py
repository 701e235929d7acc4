"""The rounds that every speculation length goes through, computed from one trace of the target and one of the draft."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiles.records.core import CATCH_UP_WIDTHS, LOOKUP_LENGTH
from profiles.records.errors import InputError, NotMeasuredError, require
from profiles.records.evidence import Acceptance, AcceptanceTrace, LookupTrace, RoundCount, StepShape, TargetTrace

WIDEST_CATCH_UP = CATCH_UP_WIDTHS[-1]
NO_END = sys.maxsize  # new tokens, for an engine whose rounds draft their full length up to the end


def catch_up_width(behind: int) -> int:
    """The width of a draft model's first step of a round when it is `behind` tokens behind: 2, 4, ... 64, 128, 192, ...

    A few widths, so that every one is timed and, on a GPU, captured; more than 64 tokens take several steps of 64.
    """
    for width in CATCH_UP_WIDTHS:
        if behind <= width:
            return width
    return -(-behind // WIDEST_CATCH_UP) * WIDEST_CATCH_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeAcceptance:
    """A composite draft over one target trace: a round asks the model where the look-up finds nothing.

    A model whose proposals were recorded is vLLM's: it drafts in every round, which takes the look-up's tokens instead
    where there are some: `LOOKUP_LENGTH`, or the model's length where that is longer.
    """

    lookup: LookupTrace
    model: Acceptance


DraftAcceptance = Acceptance | CompositeAcceptance


def combine(components: Sequence[Acceptance]) -> DraftAcceptance:
    """The acceptance of a draft from that of its components: a look-up and a model make a composite."""
    match list(components):
        case [LookupTrace() as lookup, (AcceptanceTrace() | LookupTrace()) as model]:
            return CompositeAcceptance(lookup=lookup, model=model)
        case [LookupTrace() | AcceptanceTrace() as acceptance]:
            return acceptance
    raise InputError(f"{len(components)} acceptance records: one, or a look-up's and a model's are allowed")


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
    """One way a round can go and its probability; `by_model`: the draft model ran.

    `stopped`: its confidence fell, so that its last step proposed nothing.
    """

    proposed: int
    accepted: int
    prob: float
    by_model: bool
    stopped: bool = False

    @property
    def draft_steps(self) -> int:
        """Steps of the draft model."""
        return self.proposed + self.stopped if self.by_model else 0

    def behind(self, before: int) -> int:
        """Tokens the draft model is behind afterwards; unless it stopped it has not taken in its last proposal."""
        if not self.by_model:
            return before + self.accepted + 1
        return 2 if self.accepted == self.proposed and not self.stopped else 1


def expected_rounds(
    trace: TargetTrace,
    acceptance: DraftAcceptance | None,
    length: int,
    max_new_tokens: int,
    *,
    past_end: bool = False,
    stop_below: float | None = None,
) -> RoundCounts:
    """The rounds of an engine, in expectation over the draft's random numbers given the emitted tokens.

    Exact for greedy decoding, where every accept_prob is 0 or 1. A forward pass over (start, tokens behind) states of
    the recursion in Leviathan et al. 2023, conditional on the trace: docs/how-it-works.md. Token 0 comes from the
    prefill; a round drafts at most `max_new_tokens - generated - 1`; no bonus token follows an accepted end token.

    `acceptance`: None for plain decoding. `past_end`: rounds draft their full length whatever the limit and count what
    they accept beyond it, as far as the trace is longer. `stop_below`: see `round_outcomes`.
    Raises: NotMeasuredError: the look-up trace is shorter than `length`. InputError: a draft with length 0.
    """
    size = len(trace.token_ids)
    emitted = min(size, max_new_tokens) if past_end else size
    if acceptance is None:
        count = float(emitted - 1)
        return RoundCounts(
            rounds={RoundCount(0, 0): count} if count else {}, shapes={StepShape(1): count} if count else {}
        )
    check_length(acceptance, length)
    catches_up = isinstance(acceptance, CompositeAcceptance) and isinstance(acceptance.model, AcceptanceTrace)
    # mass[start][behind]: probability that a round starts at token `start` with the draft model `behind` tokens behind
    mass: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(size + 1)]
    mass[min(1, size)][1] = 1.0
    rounds: defaultdict[RoundCount, float] = defaultdict(float)
    shapes: defaultdict[StepShape, float] = defaultdict(float)
    stop = None if stop_below is None else stop_rule(acceptance, stop_below)
    for start in range(1, emitted):
        if not mass[start]:
            continue
        limit = min(length, (NO_END if past_end else max_new_tokens) - start - 1)
        outcomes = round_outcomes(acceptance, start, limit, size, stop)
        for (behind, prob), outcome in itertools.product(mass[start].items(), outcomes):
            weight = prob * outcome.prob
            rounds[RoundCount(outcome.proposed, outcome.accepted)] += weight
            draft_steps = (outcome.draft_steps, catch_up_width(behind)) if outcome.by_model else ()
            shapes[StepShape(outcome.proposed + 1, *draft_steps)] += weight
            behind_next = outcome.behind(behind) if catches_up else 1
            mass[min(start + outcome.accepted + 1, size)][behind_next] += weight
    return RoundCounts(rounds=dict(sorted(rounds.items())), shapes=dict(sorted(shapes.items())))


def check_length(acceptance: DraftAcceptance, length: int) -> None:
    """Raises NotMeasuredError: the look-up trace is shorter than `length`. InputError: a draft with length 0."""
    require(length >= 1, f"speculation length {length}: at least 1 is needed with a draft")
    parts = (acceptance.lookup, acceptance.model) if isinstance(acceptance, CompositeAcceptance) else (acceptance,)
    lookups = [part for part in parts if isinstance(part, LookupTrace)]
    needed = [max(LOOKUP_LENGTH, length) if len(lookups) > 1 and part is lookups[0] else length for part in lookups]
    for part, longest in zip(lookups, needed, strict=True):
        if part.max_length < longest:
            raise NotMeasuredError(f"look-up measured for lengths up to {part.max_length}, not {longest}")


class StopRule(NamedTuple):
    """A round stops before a proposal whose confidence is under `below`.

    `past_rejection`: proposals that follow a rejected one on average. The trace does not hold the confidences of a text
    that was not emitted, so the draft is taken to be as often under `below` there as on the trace.
    """

    below: float
    past_rejection: float


def stop_rule(acceptance: DraftAcceptance, below: float) -> StopRule:
    """When rounds stop. Raises InputError: a look-up alone, which has no confidence."""
    model = acceptance.model if isinstance(acceptance, CompositeAcceptance) else acceptance
    require(isinstance(model, AcceptanceTrace), "a look-up has no confidence to stop below")
    assert isinstance(model, AcceptanceTrace)
    sure = sum(confidence >= below for confidence in model.confidences[1:])
    return StopRule(below, sure / (1.0 + len(model.confidences[1:]) - sure))


def round_outcomes(
    acceptance: DraftAcceptance, start: int, limit: int, size: int, stop: StopRule | None = None
) -> Iterator[RoundOutcome]:
    """The ways in which a round can go that starts at token `start` of `size` and may draft `limit` tokens.

    What is accepted is exact; with `stop` what is proposed after a rejected token is a mean.
    """
    if limit <= 0:
        yield RoundOutcome(proposed=0, accepted=0, prob=1.0, by_model=False)
        return
    if isinstance(acceptance, CompositeAcceptance):
        lookup, model = acceptance.lookup, acceptance.model
        is_recorded, finds = isinstance(model, LookupTrace), lookup.proposed[start] > 0
        limit = max(LOOKUP_LENGTH, limit) if is_recorded and finds else limit
        acceptance = lookup if finds else model
    if isinstance(acceptance, LookupTrace):
        proposed = min(limit, acceptance.proposed[start])
        accepted = min(proposed, acceptance.accepted[start])
        yield RoundOutcome(proposed=proposed, accepted=accepted, prob=1.0, by_model=False)
        return
    survival = 1.0
    longest = min(limit, size - start)  # nothing is accepted past an end token
    for accepted in range(longest):
        if stop is not None and acceptance.confidences[start + accepted] < stop.below:
            yield RoundOutcome(proposed=accepted, accepted=accepted, prob=survival, by_model=True, stopped=True)
            return
        accept_prob = acceptance.accept_probs[start + accepted]
        if accept_prob < 1.0:
            proposed = limit if stop is None else min(limit, accepted + 1 + round(stop.past_rejection))
            yield RoundOutcome(
                proposed=proposed,
                accepted=accepted,
                prob=survival * (1.0 - accept_prob),
                by_model=True,
                stopped=proposed < limit,
            )
        survival *= accept_prob
        if survival == 0.0:
            return
    yield RoundOutcome(proposed=limit, accepted=longest, prob=survival, by_model=True)
