"""Speculation length by batch size, as ranges, for an engine that changes it while it runs.

A request at batch b is decided by the smallest measured batch that is at least b, as in a policy's look-up; beyond the
largest nothing was measured, and nothing is drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.records.core import PLAIN, Draft, Interval, Setup
from tuner.export.select import Deployment, Objection, Pick
from tuner.policy.policy import Choice
from tuner.search.objective import MIN_SPEEDUP

NO_GAIN = Interval(estimate=1.0, low=1.0, high=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Batches `first` to `last` draft `length` tokens a round, at `gain` times plain decoding's speed."""

    first: int
    last: int
    length: int
    gain: Interval


def ranges_of(deployment: Deployment, draft: Draft, objection: Objection) -> tuple[Range, ...]:
    """The measured batches as ranges of one draft, without changes that gain nothing; empty for a single batch.

    A running engine keeps one draft: at a batch where another one was chosen, this draft's best forecast length is
    taken, and nothing is drafted where there is none, or where plain decoding was the choice. Also empty where nothing
    would be drafted at the choice's own batch.
    """
    if len(deployment.batches) < 2:
        return ()
    ranges, first = [], 1
    for row in deployment.batches:
        setup, gain = _of_row(row, draft, objection)
        ranges.append(Range(first=first, last=row.batch_size, length=setup.length, gain=gain))
        first = row.batch_size + 1
    done = merged(ranges)
    return done if length_at(done, deployment.choice.batch_size) > 0 else ()


def as_scheduled(pick: Pick, ranges: Sequence[Range]) -> tuple[Pick, list[str]]:
    """The pick with its length in the ranges at the choice's batch, and a note where that is another one."""
    setup, length = pick.setup, length_at(ranges, pick.deployment.choice.batch_size)
    if length == setup.length:
        return pick, []
    note = f"k={length} instead of {setup.length}: the longer draft gains too little over a neighbouring batch's"
    return replace(pick, setup=replace(setup, length=length)), [note]


def claims_of(pick: Pick, ranges: Sequence[Range]) -> dict[int, Setup]:
    """What every measured batch decodes with under a schedule of a pick's draft: plain decoding where it says 0."""
    lengths = {row.batch_size: length_at(ranges, row.batch_size) for row in pick.deployment.batches}
    return {size: replace(pick.setup, length=length) if length else PLAIN for size, length in lengths.items()}


def merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Neighbours joined, with the shorter length, until every change that is left has a real gain.

    A change between lengths as the batch varies costs time, so the longer draft must be worth it: the interval of its
    speed-up lies above the shorter one's estimate, or its estimate is 1.5 % above. (Plain decoding's speed-up is 1.)
    """
    done = list(ranges)
    index = 0
    while index + 1 < len(done):
        here, after = done[index], done[index + 1]
        shorter, longer = sorted((here, after), key=lambda neighbour: neighbour.length)
        gain, other = longer.gain, shorter.gain.estimate
        if here.length != after.length and (gain.low > other or gain.estimate >= MIN_SPEEDUP * other):
            index += 1
            continue
        if here.length == after.length:
            shorter = min(here, after, key=lambda neighbour: neighbour.gain.estimate)
        done[index : index + 2] = [replace(shorter, first=here.first, last=after.last)]
        index = max(index - 1, 0)
    return tuple(done)


def length_at(ranges: Sequence[Range], batch_size: int) -> int:
    return next((stretch.length for stretch in ranges if stretch.first <= batch_size <= stretch.last), 0)


def _of_row(row: Choice, draft: Draft, objection: Objection) -> tuple[Setup, Interval]:
    """The draft's setup at a measured batch and its speed-up over plain decoding there."""
    if row.setup == PLAIN:
        return PLAIN, NO_GAIN
    if row.setup.draft == draft and objection(row.setup) is None:
        return row.setup, NO_GAIN if row.figures is None else row.figures.speedup
    options = (forecast for forecast in row.alternatives if forecast.setup.draft == draft)
    allowed = next((forecast for forecast in options if objection(forecast.setup) is None), None)
    return (PLAIN, NO_GAIN) if allowed is None else (allowed.setup, allowed.speedup)
