"""Speculation length by batch size, as ranges, for an engine that changes it while it runs.

A request at batch b is decided by the smallest measured batch that is at least b, as in a policy's look-up; beyond the
largest nothing was measured, and nothing is drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.records.core import PLAIN, Draft, Setup
from tuner.export.select import Deployment, Objection, Pick
from tuner.policy.policy import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Batches `first` to `last` draft `length` tokens a round."""

    first: int
    last: int
    length: int


def ranges_of(deployment: Deployment, draft: Draft, objection: Objection) -> tuple[Range, ...]:
    """The measured batches as ranges of one draft, neighbours of one length joined; empty for a single batch.

    A running engine keeps one draft: at a batch where another one was chosen, this draft's best forecast length is
    taken, and nothing is drafted where there is none, or where plain decoding was the choice.
    """
    if len(deployment.batches) < 2:
        return ()
    ranges: list[Range] = []
    first = 1
    for row in deployment.batches:
        length = _length(row, draft, objection)
        if ranges and ranges[-1].length == length:
            ranges[-1] = replace(ranges[-1], last=row.batch_size)
        else:
            ranges.append(Range(first=first, last=row.batch_size, length=length))
        first = row.batch_size + 1
    return tuple(ranges)


def claims_of(pick: Pick, ranges: Sequence[Range]) -> dict[int, Setup]:
    """What every measured batch decodes with under a schedule of a pick's draft: plain decoding where it says 0."""
    return {
        row.batch_size: replace(pick.setup, length=stretch.length) if stretch.length else PLAIN
        for row in pick.deployment.batches
        for stretch in ranges
        if stretch.first <= row.batch_size <= stretch.last
    }


def _length(row: Choice, draft: Draft, objection: Objection) -> int:
    """The draft's length at a measured batch; 0 for plain decoding."""
    options = (row.setup, *(forecast.setup for forecast in row.alternatives)) if row.setup != PLAIN else ()
    return next((setup.length for setup in options if setup.draft == draft and objection(setup) is None), 0)
