"""What rounds take beyond their steps, calibrated on a few real runs: host work, and steps that follow each other.

A step timed alone is not a step in a round: caches are warmer in a row of draft steps, and the loop costs time of its
own. A round timed whole has the loop in it; real ones take a multiple of it, for their texts have other lengths.
Arithmetic on records; how a forecast uses it is elsewhere.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP
from profiles.engines.base import Times
from profiles.records.core import Draft, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Sample, StepShape, StepTimes
from profiles.stats import median

LEAST_REFILLS = 0.05  # per round, that two runs must differ by to tell what one takes
LEAST_FACTOR = 0.1  # a few disturbed runs may say that rounds take next to nothing
Steps = Mapping[str, StepTimes]
Calibration = Iterable[tuple[Setup, Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds beyond the steps: per round that proposed nothing, per round that did, per step of the draft model.

    `refill_s` is what another row's prefill takes. `factor`: what a step takes, as a multiple of what it was timed at.
    """

    idle_s: float = 0.0
    round_s: float = 0.0
    drafted_s: float = 0.0
    refill_s: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What rounds use: steps by (part digest, width), rounds without and with proposals, draft steps, refills."""

    steps: Mapping[tuple[str, int], float]
    idle: float
    proposing: float
    drafted: float
    refills: float

    def overhead_s(self, rates: numpy.ndarray) -> numpy.ndarray:
        """Seconds beyond the steps for `rates` (5, any), the fields of `Overhead` down the rows."""
        seconds: numpy.ndarray = numpy.array([self.idle, self.proposing, self.drafted, self.refills]) @ rates[:4]
        return seconds


def use_of(
    setup: Setup, shapes: Mapping[StepShape, float], refills: float, target_part: str, times: Times = "steps"
) -> Use:
    """What rounds of these `shapes` use, each (width of the target's step, draft steps, width of the first of them).

    A first step wider than the widest there is was several of that width. A look-up is asked once per round, also when
    it proposes nothing. Where an engine times whole `rounds`, each is one step, of plain decoding or of the draft.
    """
    if times == "rounds":
        return _whole_rounds(setup, shapes, refills, target_part)
    steps: defaultdict[tuple[str, int], float] = defaultdict(float)
    idle = proposing = drafted = 0.0
    ngram, model = _parts(setup.draft)
    for (width, draft_steps, first_width), count in shapes.items():
        steps[target_part, width] += count
        idle, proposing = (idle, proposing + count) if width > 1 else (idle + count, proposing)
        if ngram is not None:
            steps[ngram, setup.length] += count
        if model is not None and draft_steps > 0:
            widest = min(first_width, WIDEST_CATCH_UP)
            steps[model, widest] += count * first_width / widest
            steps[model, 1] += count * (draft_steps - 1)
            drafted += count * draft_steps
    return Use(
        steps={step: count for step, count in steps.items() if count},
        idle=idle,
        proposing=proposing,
        drafted=drafted,
        refills=refills,
    )


def _whole_rounds(setup: Setup, shapes: Mapping[StepShape, float], refills: float, target_part: str) -> Use:
    part = target_part if setup.draft is None else setup.draft.digest
    steps: defaultdict[tuple[str, int], float] = defaultdict(float)
    for shape, count in shapes.items():
        steps[part, shape.target_width] += count
    idle = steps.get((part, 1), 0.0)
    return Use(steps=dict(steps), idle=idle, proposing=sum(steps.values()) - idle, drafted=0.0, refills=refills)


def _parts(draft: Draft | None) -> tuple[str | None, str | None]:
    """Part digests of a draft's look-up and of its model, where it has them."""
    by_kind = {part.kind == "ngram": part.digest for part in draft.components} if draft is not None else {}
    return by_kind.get(True), by_kind.get(False)


def step_samples(steps: Steps, part: str, width: int) -> tuple[float, ...]:
    """Seconds of a step. Raises NotMeasuredError when it was never timed."""
    times = steps.get(part)
    if times is None or width not in times.samples_s:
        raise NotMeasuredError(f"step time of part {part} at width {width} is not known")
    return times.samples_s[width]


def calibrate(
    steps: Steps, calibration: Calibration, target_part: str, times: Times = "steps"
) -> dict[Draft | None, Overhead]:
    """The overheads of plain decoding (None) and of every draft that was run.

    A round without a proposal is a plain round, whatever the draft. Per step of a draft model, drafts share one figure
    *relative to their own step*: what a row of steps saves over single ones is a share of the step, and one draft's
    line through two lengths is mostly noise. The rest is per round that proposed. Medians weighted by rounds. Where
    whole `rounds` are timed, a draft has a factor on them and nothing else but its prefills.
    """
    runs: dict[Draft | None, list[_Run]] = {}
    for setup, sample in calibration:
        if sample.rounds and not sample.shapes:
            raise NotMeasuredError(f"a run of {setup.name} does not say what its rounds ran: it must be measured again")
        use = use_of(setup, sample.shapes, sample.refills, target_part, times)
        stepped_s = sum(count * median(step_samples(steps, *step)) for step, count in use.steps.items())
        runs.setdefault(setup.draft, []).append(_Run(use=use, stepped_s=stepped_s, sample=sample))
    if times == "rounds":
        return {draft: _of_rounds(own) for draft, own in runs.items()}
    return _of_steps(steps, runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A calibration run, what it used, and the seconds of its steps as they were timed."""

    use: Use
    stepped_s: float
    sample: Sample


def _of_steps(steps: Steps, runs: Mapping[Draft | None, list[_Run]]) -> dict[Draft | None, Overhead]:
    refill_s = {draft: median(run.sample.ttft_s for run in own) for draft, own in runs.items()}
    beyond = {
        draft: [(run.use, run.sample.decode_s - run.stepped_s - run.sample.refills * refill_s[draft]) for run in own]
        for draft, own in runs.items()
    }
    idle_s = _weighted_median([(left_s / use.idle, use.idle) for use, left_s in beyond.get(None, []) if use.idle])
    # per draft: (draft steps a round, seconds beyond an idle round's, rounds) of every run that proposed
    points = {
        draft: [
            (use.drafted / use.proposing, (left_s - use.idle * idle_s) / use.proposing, use.proposing)
            for use, left_s in own
            if use.proposing
        ]
        for draft, own in beyond.items()
        if draft is not None
    }
    step_s = {draft: _model_step_s(steps, draft) for draft in points}
    slopes = [
        slope / step_s[draft] for draft in points if step_s[draft] and (slope := _slope(points[draft])) is not None
    ]
    share = median(slopes) if slopes else 0.0
    rates: dict[Draft | None, Overhead] = {None: Overhead(idle_s=idle_s, refill_s=refill_s.get(None, 0.0))}
    for draft, own_points in points.items():
        drafted_s = share * step_s[draft]
        round_s = _weighted_median([(seconds - drafted_s * drafted, rounds) for drafted, seconds, rounds in own_points])
        rates[draft] = Overhead(idle_s=idle_s, round_s=round_s, drafted_s=drafted_s, refill_s=refill_s[draft])
    return rates


def _of_rounds(runs: Sequence[_Run]) -> Overhead:
    """The factor on a draft's timed rounds: the median over its runs, weighted by their seconds."""
    refill_s = _refill_s(runs)
    factors = [
        (max(LEAST_FACTOR, (run.sample.decode_s - run.sample.refills * refill_s) / run.stepped_s), run.stepped_s)
        for run in runs
        if run.stepped_s
    ]
    return Overhead(refill_s=refill_s, factor=_weighted_median(factors) if factors else 1.0)


def _refill_s(runs: Sequence[_Run]) -> float:
    """Seconds that another request's prefill adds to a request: what runs took longer the more of them there were.

    In continuous batching a prefill is part of a round, so the time to a first token, which waits for rounds and for
    others' prefills, does not tell. The median slope over pairs of runs (Theil and Sen), per round; where they differ
    too little to tell, the shortest time to a first token.
    """
    points = []
    for run in runs:
        if num_rounds := run.use.idle + run.use.proposing:
            points.append((run.sample.refills / num_rounds, (run.sample.decode_s - run.stepped_s) / num_rounds))
    slopes = [
        (y1 - y0) / (x1 - x0)
        for (x0, y0), (x1, y1) in itertools.combinations(sorted(points), 2)
        if x1 - x0 >= LEAST_REFILLS
    ]
    return max(0.0, median(slopes)) if slopes else min(run.sample.ttft_s for run in runs)


def _model_step_s(steps: Steps, draft: Draft) -> float:
    """Seconds of a single-token step of a draft's model; 0 where it has none."""
    model = _parts(draft)[1]
    return 0.0 if model is None else median(step_samples(steps, model, 1))


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
