"""Arithmetic on records: the walk over a trace, acceptance figures, paired ratios with intervals, Holm's step-down.

Every figure draftpick prints is derived here or in `tuner.forecast` from raw counts and times. No models, no files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

from profiles.errors import InputError, NotMeasuredError
from profiles.terms import Acceptance, Interval, LookupTrace, Sample, TargetTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """The rounds of one sequence: expected count of each (proposed, accepted), and of catch-up rounds.

    A catch-up round follows one whose proposals were all kept: the draft is one token behind and its first step is
    two tokens wide.
    """

    rounds: Mapping[tuple[int, int], float]
    catch_ups: float

    @property
    def num_rounds(self) -> float:
        return sum(self.rounds.values())


def walk(trace: TargetTrace, acceptance: Acceptance | None, length: int, max_new_tokens: int) -> Walk:
    """The rounds the engine would go through, in expectation over the draft's luck given the emitted tokens.

    Exact for greedy decoding, where every keep probability is 0 or 1. A forward pass over (start, behind) states of
    the recursion in Leviathan et al. 2023, conditional on the trace: O(tokens x length). Token 0 comes from the
    prefill; a round drafts at most `max_new_tokens - generated - 1`; an accepted end token ends it with no target
    token. `acceptance` None is plain decoding.

    Raises: NotMeasuredError: the look-up trace is shorter than `length`. InputError: a draft with length 0.
    """
    size = len(trace.token_ids)
    if acceptance is None:
        return Walk(rounds={(0, 0): float(size - 1)} if size > 1 else {}, catch_ups=0.0)
    if length < 1:
        raise InputError(f"speculation length {length}: at least 1 is needed with a draft")
    if isinstance(acceptance, LookupTrace) and acceptance.max_length < length:
        raise NotMeasuredError(f"look-up measured for lengths up to {acceptance.max_length}, not {length}")
    fresh, behind = [0.0] * (size + 1), [0.0] * (size + 1)
    fresh[min(1, size)] = 1.0
    rounds: dict[tuple[int, int], float] = {}
    catch_ups = 0.0
    for start in range(1, size):
        mass = fresh[start] + behind[start]
        if mass == 0.0:
            continue
        asked = min(length, max_new_tokens - start - 1)
        for proposed, accepted, share in _outcomes(acceptance, start, asked, size):
            weight = mass * share
            rounds[proposed, accepted] = rounds.get((proposed, accepted), 0.0) + weight
            following = min(start + accepted + 1, size)
            if proposed > 0 and proposed == accepted:
                behind[following] += weight
            else:
                fresh[following] += weight
        if asked > 0:
            catch_ups += behind[start]
    return Walk(rounds=dict(sorted(rounds.items())), catch_ups=catch_ups)


def _outcomes(acceptance: Acceptance, start: int, asked: int, size: int) -> Iterator[tuple[int, int, float]]:
    """(proposed, accepted, probability) of a round that starts at `start` and may draft `asked` tokens."""
    if isinstance(acceptance, LookupTrace):
        proposed = min(asked, acceptance.proposed[start]) if asked > 0 else 0
        yield proposed, min(proposed, acceptance.kept[start]), 1.0
        return
    survival = 1.0
    most = min(asked, size - start)  # past an accepted end token nothing is kept
    for accepted in range(most):
        keep = acceptance.keep_probs[start + accepted]
        if keep < 1.0:
            yield asked, accepted, survival * (1.0 - keep)
        survival *= keep
        if survival == 0.0:
            return
    yield max(asked, 0), most if asked > 0 else 0, survival


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
