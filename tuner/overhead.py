"""What rounds take beyond their steps, calibrated on a few real runs: host work, and steps that follow each other.

A step timed alone is not a step in a round: caches are warmer in a row of draft steps, and the loop costs time of its
own. Arithmetic on records; how a forecast uses it is elsewhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy

from profiles.errors import NotMeasuredError
from profiles.formulas import median
from profiles.terms import PLAIN, Draft, Sample, Setup, StepTimes

Steps = Mapping[str, StepTimes]
Calibration = Iterable[tuple[Setup, Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds beyond the steps: per round that proposed nothing, per round that did, per drafted token."""

    idle_s: float = 0.0
    round_s: float = 0.0
    drafted_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What rounds use: steps by (part digest, width), rounds without and with proposals, drafted tokens."""

    steps: Mapping[tuple[str, int], float]
    idle: float
    proposing: float
    drafted: float

    def overhead_s(self, rates: numpy.ndarray) -> numpy.ndarray:
        """Seconds beyond the steps for `rates` (3, any), the fields of `Overhead` down the rows."""
        seconds: numpy.ndarray = numpy.array([self.idle, self.proposing, self.drafted]) @ rates
        return seconds


def use_of(setup: Setup, rounds: Mapping[tuple[int, int], float], catch_ups: float, target_part: str) -> Use:
    """What `rounds` use.

    A round of d proposals costs one target step of width d + 1 and d draft steps; one step of a catch-up round is two
    tokens wide. A look-up is asked once per round, also when it proposes nothing.
    """
    steps: dict[tuple[str, int], float] = {}
    for (proposed, _), count in rounds.items():
        steps[target_part, proposed + 1] = steps.get((target_part, proposed + 1), 0.0) + count
    proposing = sum(count for (proposed, _), count in rounds.items() if proposed > 0)
    idle = sum(rounds.values()) - proposing
    drafted = sum(proposed * count for (proposed, _), count in rounds.items())
    draft = setup.draft
    if draft is not None and draft.kind == "ngram":
        steps[draft.digest, setup.length] = idle + proposing
    elif draft is not None:
        steps[draft.digest, 1] = drafted - catch_ups
        steps[draft.digest, 2] = catch_ups
    return Use(steps=steps, idle=idle, proposing=proposing, drafted=drafted)


def step_samples(steps: Steps, part: str, width: int) -> tuple[float, ...]:
    """Seconds of a step. Raises NotMeasuredError when it was never timed."""
    times = steps.get(part)
    if times is None or width not in times.samples_s:
        raise NotMeasuredError(f"step time of part {part} at width {width} is not known")
    return times.samples_s[width]


def calibrate(steps: Steps, calibration: Calibration, target_part: str) -> dict[Draft | None, Overhead]:
    """The overheads of plain decoding (None) and of every draft that was run.

    A round without a proposal is a plain round, whatever the draft. Per drafted token, drafts with a model share one
    figure *relative to their own step*: what a row of steps saves over single ones is a share of the step, and one
    draft's line through two lengths is mostly noise. The rest is per round that proposed. Medians weighted by rounds.
    """
    runs: dict[Setup, list[tuple[Use, float]]] = {}
    for setup, sample in calibration:
        full = sum(count for (asked, kept), count in sample.rounds.items() if 0 < asked == kept)
        use = use_of(setup, sample.rounds, full, target_part)
        stepped = sum(count * median(step_samples(steps, *step)) for step, count in use.steps.items())
        runs.setdefault(setup, []).append((use, sample.decode_s - stepped))
    idle_s = _weighted_median([(beyond_s / use.idle, use.idle) for use, beyond_s in runs.get(PLAIN, []) if use.idle])
    # per draft: (drafted tokens a round, seconds beyond an idle round's, rounds) of every run that proposed
    points: dict[Draft, list[tuple[float, float, float]]] = {}
    for setup, own in runs.items():
        if setup.draft is not None:
            points.setdefault(setup.draft, []).extend(
                (use.drafted / use.proposing, (beyond_s - use.idle * idle_s) / use.proposing, use.proposing)
                for use, beyond_s in own
                if use.proposing
            )
    step_s = {draft: median(step_samples(steps, draft.digest, 1)) for draft in points if draft.kind != "ngram"}
    slopes = [slope / step_s[draft] for draft in step_s if (slope := _slope(points[draft])) is not None]
    share = median(slopes) if slopes else 0.0
    rates: dict[Draft | None, Overhead] = {None: Overhead(idle_s=idle_s)}
    for draft, own_points in points.items():
        drafted_s = share * step_s.get(draft, 0.0)
        round_s = _weighted_median([(seconds - drafted_s * drafted, rounds) for drafted, seconds, rounds in own_points])
        rates[draft] = Overhead(idle_s=idle_s, round_s=round_s, drafted_s=drafted_s)
    return rates


def _slope(points: list[tuple[float, float, float]]) -> float | None:
    """Seconds per drafted token by Theil and Sen: the median slope over pairs that lie a token or more apart."""
    slopes = [(y1 - y0) / (x1 - x0) for x0, y0, _ in points for x1, y1, _ in points if x1 - x0 >= 1.0]
    return median(slopes) if slopes else None


def _weighted_median(values: list[tuple[float, float]]) -> float:
    """The median of (value, weight) pairs; 0 when there is none."""
    if not values:
        return 0.0
    figures, weights = zip(*values, strict=True)
    return float(numpy.quantile(figures, 0.5, weights=weights, method="inverted_cdf"))
