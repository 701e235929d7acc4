"""Arithmetic on records: the walk over a trace, acceptance figures, paired ratios with intervals, Holm's step-down.

Every figure draftpick prints is derived here or in `tuner.forecast` from raw counts and times. No models, no files.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy

from profiles.errors import InputError, NotMeasuredError
from profiles.terms import CATCH_UP_WIDTHS, Acceptance, AcceptanceTrace, Interval, LookupTrace, Sample, TargetTrace

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
    """The parts of a composite draft over one target trace; a round asks the model where the look-up finds nothing."""

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
class Walk:
    """The rounds of one sequence alone in its batch: expected counts of each (proposed, accepted) and of each shape.

    A shape is (width of the target's step, steps of the draft model, width of the first of them), as in `Sample`.
    """

    rounds: Mapping[tuple[int, int], float]
    shapes: Mapping[tuple[int, int, int], float]

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


def walk(
    trace: TargetTrace, acceptance: Replayed | None, length: int, max_new_tokens: int, *, past_end: bool = False
) -> Walk:
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
            return Walk(rounds={}, shapes={})
        return Walk(rounds={(0, 0): float(emitted - 1)}, shapes={(1, 0, 0): float(emitted - 1)})
    check_length(acceptance, length)
    states: list[dict[int, float]] = [{} for _ in range(size + 1)]
    states[min(1, size)] = {1: 1.0}
    rounds: dict[tuple[int, int], float] = {}
    shapes: dict[tuple[int, int, int], float] = {}
    for start in range(1, emitted):
        asked = min(length, (NO_END if past_end else max_new_tokens) - start - 1)
        outcomes = list(round_outcomes(acceptance, start, asked, size)) if states[start] else []
        for (behind, mass), outcome in itertools.product(states[start].items(), outcomes):
            weight = mass * outcome.share
            counted = outcome.proposed, outcome.accepted
            rounds[counted] = rounds.get(counted, 0.0) + weight
            steps = (outcome.proposed, catch_up_width(behind)) if outcome.by_model else (0, 0)
            shape = (outcome.proposed + 1, *steps)
            shapes[shape] = shapes.get(shape, 0.0) + weight
            following = states[min(start + outcome.accepted + 1, size)]
            after = outcome.behind(behind) if isinstance(acceptance, CompositeAcceptance) else 1
            following[after] = following.get(after, 0.0) + weight
    return Walk(rounds=dict(sorted(rounds.items())), shapes=dict(sorted(shapes.items())))


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
        yield RoundOutcome(proposed=proposed, accepted=min(proposed, acceptance.kept[start]), share=1.0, by_model=False)
        return
    survival = 1.0
    most = min(asked, size - start)  # past an accepted end token nothing is kept
    for accepted in range(most):
        keep = acceptance.keep_probs[start + accepted]
        if keep < 1.0:
            yield RoundOutcome(proposed=asked, accepted=accepted, share=survival * (1.0 - keep), by_model=True)
        survival *= keep
        if survival == 0.0:
            return
    yield RoundOutcome(proposed=asked, accepted=most, share=survival, by_model=True)


def acceptance_rate(rounds: Mapping[tuple[int, int], float]) -> float | None:
    """Accepted / drafted tokens; None when nothing was drafted."""
    drafted = sum(proposed * count for (proposed, _), count in rounds.items())
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    return accepted / drafted if drafted else None


def acceptance_length(rounds: Mapping[tuple[int, int], float]) -> float | None:
    """1 + accepted / rounds, the target token included; None when there was no round."""
    num_rounds = sum(rounds.values())
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    return 1.0 + accepted / num_rounds if num_rounds else None


def tested_acceptance(rounds: Mapping[tuple[int, int], float]) -> float | None:
    """Alpha: accepted / (accepted + rejected), where a round rejects at most one token; None when none was tested."""
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    rejected = sum(count for (proposed, kept), count in rounds.items() if kept < proposed)
    return accepted / (accepted + rejected) if accepted + rejected else None


def acceptance_by_position(rounds: Mapping[tuple[int, int], float]) -> list[tuple[int, float, float]]:
    """(position from 1, rounds that proposed that far, share of those that kept that far)."""
    longest = max((proposed for proposed, _ in rounds), default=0)
    rows = []
    for position in range(1, longest + 1):
        tried = sum(count for (proposed, _), count in rounds.items() if proposed >= position)
        kept = sum(count for (_, accepted), count in rounds.items() if accepted >= position)
        rows.append((position, tried, kept / tried))
    return rows


def tpot_s(sample: Sample) -> float | None:
    """(end - first token) / (tokens - 1) in seconds; None for a run of one token."""
    return sample.decode_s / (sample.output_tokens - 1) if sample.output_tokens > 1 else None


def rate_interval(seconds: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Tokens per second over prompts: ratio of totals, 95 % t interval of the linearised ratio (Cochran 1977, 6.3)."""
    return _ratio_of_totals([tokens], [seconds])[0]


def speedup_interval(
    plain_s: Sequence[float], plain_tokens: Sequence[int], chosen_s: Sequence[float], chosen_tokens: Sequence[int]
) -> tuple[Interval, float]:
    """Plain seconds per token / chosen seconds per token, paired by prompt, and the two-sided p-value of "equal".

    95 % t interval of the log of the ratio of totals, linearised over prompts: a percentile bootstrap of few prompts
    covers too seldom. Raises InputError under two prompts or without a token.
    """
    return _ratio_of_totals([plain_s, chosen_tokens], [chosen_s, plain_tokens])


def _ratio_of_totals(tops: list[Sequence[float]], bottoms: list[Sequence[float]]) -> tuple[Interval, float]:
    """Product of the totals in `tops` over that in `bottoms`, one entry per prompt, and the p-value of ratio 1."""
    from scipy import stats  # slow to import, and a look-up's forecast does without

    size = len(tops[0])
    if size < 2:
        raise InputError(f"an interval over {size} prompts: at least 2 are needed")
    totals = [sum(part) for part in tops + bottoms]
    if min(totals) <= 0.0:
        raise InputError("a ratio of nothing: there are no tokens or no seconds")
    log_ratio = sum(math.log(total) for total in totals[: len(tops)])
    log_ratio -= sum(math.log(total) for total in totals[len(tops) :])
    terms = numpy.zeros(size)
    for sign, parts in ((1.0, tops), (-1.0, bottoms)):
        for part in parts:
            terms += sign * numpy.asarray(part, float) / numpy.mean(part)
    error = float(numpy.std(terms, ddof=1) / math.sqrt(size))
    reach = float(stats.t.ppf(0.975, size - 1)) * error
    if error > 0.0:
        p_value = float(2.0 * stats.t.sf(abs(log_ratio) / error, size - 1))
    else:
        p_value = 1.0 if log_ratio == 0.0 else 0.0
    ratio = math.exp(log_ratio)
    return Interval(estimate=ratio, low=ratio * math.exp(-reach), high=ratio * math.exp(reach)), p_value


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's step-down rejects at family-wise `level` (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def median(values: Iterable[float]) -> float:
    """The median; raises InputError on no values, because no data is never 0."""
    ordered = sorted(values)
    if not ordered:
        raise InputError("the median of no values")
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
