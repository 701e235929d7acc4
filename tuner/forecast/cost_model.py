"""What rounds cost: which steps they use, and the overhead beyond these steps, calibrated on a few real runs.

A step timed alone is not a step within a round: caches are warmer in a row of draft steps, and the decoding loop costs
time of its own. There are two cost models, because some engines let the steps of target and draft be timed apart and
others only whole rounds.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP
from profiles.engines.base import EngineCapabilities
from profiles.records.core import Draft, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Sample, StepShape, StepTimes
from profiles.stats import median

MIN_REFILL_DIFFERENCE = 0.05  # refills per round by which two runs must differ to show what a refill takes
MIN_FACTOR = 0.1  # a few disturbed runs may claim that rounds take next to nothing

Steps = Mapping[str, StepTimes]  # by component digest
Shapes = Mapping[StepShape, float]  # how often rounds of each shape were run (see `Sample.shapes`)
Seconds = TypeVar("Seconds", float, numpy.ndarray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What rounds use: steps by (component digest, width), rounds without and with proposals, draft steps, refills."""

    steps: Mapping[tuple[str, int], float]
    num_idle: float
    num_proposing: float
    num_draft_steps: float
    num_refills: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead(Generic[Seconds]):
    """Seconds beyond the steps, as single values or as arrays of resamplings.

    `idle_s` is per round without a proposal, `proposing_s` per round with one, `draft_step_s` per step of the draft
    model, `refill_s` per prefill of another row. `factor` multiplies the time that steps were measured at.
    """

    idle_s: Seconds
    proposing_s: Seconds
    draft_step_s: Seconds
    refill_s: Seconds
    factor: Seconds

    def beyond_steps_s(self, usage: Usage) -> Seconds:
        """Seconds that rounds with this usage take in addition to their steps."""
        return (
            usage.num_idle * self.idle_s
            + usage.num_proposing * self.proposing_s
            + usage.num_draft_steps * self.draft_step_s
            + usage.num_refills * self.refill_s
        )


NO_OVERHEAD = Overhead(idle_s=0.0, proposing_s=0.0, draft_step_s=0.0, refill_s=0.0, factor=1.0)


def stack(overheads: Sequence[Overhead[float]]) -> Overhead[numpy.ndarray]:
    """The overheads of several resamplings as arrays."""
    columns = numpy.array([astuple(overhead) for overhead in overheads]).T
    return Overhead(
        idle_s=columns[0], proposing_s=columns[1], draft_step_s=columns[2], refill_s=columns[3], factor=columns[4]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRun:
    """A real run, what it used, and the seconds of its steps as they were timed."""

    usage: Usage
    stepped_s: float
    sample: Sample


RunsByDraft = Mapping[Draft | None, Sequence[CalibrationRun]]


class CostModel(Protocol):
    """How rounds become seconds on one kind of engine."""

    @property
    def calibration_prompts(self) -> int:
        """How many prompts are run at batch 1 to calibrate the overhead."""
        ...

    def complete(self, steps: Steps) -> Steps:
        """Adds the step times that the engine cannot measure but forecasts need."""
        ...

    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """What rounds of these shapes use."""
        ...

    def overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead[float]]:
        """The overhead of plain decoding (None) and of every draft in `runs`."""
        ...

    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        """Seconds by component as (drafting, verifying); drafting is None where the two are not told apart."""
        ...


def cost_model_of(capabilities: EngineCapabilities, target_component: str) -> CostModel:
    """The cost model that fits what the engine can time."""
    model = RoundCostModel if capabilities.times == "rounds" else StepCostModel
    return model(target_component)


def calibrate(
    model: CostModel, steps: Steps, runs: Iterable[tuple[Setup, Sample]]
) -> dict[Draft | None, Overhead[float]]:
    """Overheads by draft from real runs.

    Raises:
        NotMeasuredError: a run does not tell the shapes of its rounds, or uses a step that was never timed.
    """
    by_draft: dict[Draft | None, list[CalibrationRun]] = {}
    for setup, sample in runs:
        if sample.rounds and not sample.shapes:
            raise NotMeasuredError(f"a run of {setup.name} does not say what its rounds ran: it must be measured again")
        usage = model.usage(setup, sample.shapes, sample.refills)
        stepped_s = sum(count * median(step_samples(steps, *step)) for step, count in usage.steps.items())
        by_draft.setdefault(setup.draft, []).append(CalibrationRun(usage=usage, stepped_s=stepped_s, sample=sample))
    return model.overheads(steps, by_draft)


def step_samples(steps: Steps, component: str, width: int) -> tuple[float, ...]:
    """Measured seconds of one step. Raises NotMeasuredError when it was never timed."""
    times = steps.get(component)
    if times is None or width not in times.samples_s:
        raise NotMeasuredError(f"the step time of component {component} at width {width} was not measured")
    return times.samples_s[width]


@dataclass(frozen=True, slots=True)
class StepCostModel:
    """Steps of target and draft are timed apart.

    Per step of a draft model, drafts share one overhead *relative to their own step*: what a row of steps saves over
    single ones is a share of the step, and one draft's line through two lengths is mostly noise. The rest is an
    overhead per round that proposed. A round without a proposal costs what a plain round costs, whatever the draft.
    """

    target_component: str
    calibration_prompts: int = 3

    def complete(self, steps: Steps) -> Steps:
        return steps

    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """A look-up is asked once per round, also when it proposes nothing.

        A first draft step wider than the widest that is timed counts as several steps of that width.
        """
        steps: defaultdict[tuple[str, int], float] = defaultdict(float)
        num_idle = num_proposing = num_draft_steps = 0.0
        lookup, model = _components(setup.draft)
        for (target_width, draft_steps, first_draft_width), count in shapes.items():
            steps[self.target_component, target_width] += count
            if target_width > 1:
                num_proposing += count
            else:
                num_idle += count
            if lookup is not None:
                steps[lookup, setup.length] += count
            if model is not None and draft_steps > 0:
                widest = min(first_draft_width, WIDEST_CATCH_UP)
                steps[model, widest] += count * first_draft_width / widest
                steps[model, 1] += count * (draft_steps - 1)
                num_draft_steps += count * draft_steps
        return Usage(
            steps={step: count for step, count in steps.items() if count},
            num_idle=num_idle,
            num_proposing=num_proposing,
            num_draft_steps=num_draft_steps,
            num_refills=num_refills,
        )

    def overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead[float]]:
        refill_s = {draft: median(run.sample.ttft_s for run in own_runs) for draft, own_runs in runs.items()}
        beyond = {
            draft: [
                (run.usage, run.sample.decode_s - run.stepped_s - run.sample.refills * refill_s[draft])
                for run in own_runs
            ]
            for draft, own_runs in runs.items()
        }
        idle_s = _weighted_median(
            [(seconds / use.num_idle, use.num_idle) for use, seconds in beyond.get(None, []) if use.num_idle]
        )
        points = {
            draft: [
                _RoundPoint(
                    draft_steps=usage.num_draft_steps / usage.num_proposing,
                    seconds=(seconds - usage.num_idle * idle_s) / usage.num_proposing,
                    num_rounds=usage.num_proposing,
                )
                for usage, seconds in own_runs
                if usage.num_proposing
            ]
            for draft, own_runs in beyond.items()
            if draft is not None
        }
        step_s = {draft: _model_step_s(steps, draft) for draft in points}
        shares = [
            slope / step_s[draft] for draft in points if step_s[draft] and (slope := _slope(points[draft])) is not None
        ]
        share = median(shares) if shares else 0.0
        overheads: dict[Draft | None, Overhead[float]] = {
            None: replace(NO_OVERHEAD, idle_s=idle_s, refill_s=refill_s.get(None, 0.0))
        }
        for draft, own_points in points.items():
            draft_step_s = share * step_s[draft]
            proposing_s = _weighted_median(
                [(point.seconds - draft_step_s * point.draft_steps, point.num_rounds) for point in own_points]
            )
            overheads[draft] = Overhead(
                idle_s=idle_s,
                proposing_s=proposing_s,
                draft_step_s=draft_step_s,
                refill_s=refill_s[draft],
                factor=1.0,
            )
        return overheads

    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        verifying_s = step_seconds.get(self.target_component, 0.0)
        return sum(step_seconds.values()) - verifying_s, verifying_s


@dataclass(frozen=True, slots=True)
class RoundCostModel:
    """Only whole rounds are timed, of plain decoding and of every draft at each length.

    A timed round has the decoding loop in it; rounds of real texts take a multiple of it, because their lengths differ.
    So a draft has a factor on its timed rounds and nothing else but its prefills.
    """

    target_component: str
    calibration_prompts: int = 6  # they are the only check of the timed rounds, and runs are short

    def complete(self, steps: Steps) -> Steps:
        """A draft that always proposes has no timed round without a proposal: a plain round stands for it."""
        plain_s = steps[self.target_component].samples_s[1]
        return {
            component: replace(times, samples_s={1: plain_s, **times.samples_s}) for component, times in steps.items()
        }

    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """Each round is one step, of plain decoding or of the draft, as wide as the tokens it verifies."""
        component = self.target_component if setup.draft is None else setup.draft.digest
        steps: defaultdict[tuple[str, int], float] = defaultdict(float)
        for shape, count in shapes.items():
            steps[component, shape.target_width] += count
        num_idle = steps.get((component, 1), 0.0)
        return Usage(
            steps=dict(steps),
            num_idle=num_idle,
            num_proposing=sum(steps.values()) - num_idle,
            num_draft_steps=0.0,
            num_refills=num_refills,
        )

    def overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead[float]]:  # noqa: ARG002
        return {draft: self._overhead(own_runs) for draft, own_runs in runs.items()}

    def _overhead(self, runs: Sequence[CalibrationRun]) -> Overhead[float]:
        """The factor is the median over runs, weighted by their seconds."""
        refill_s = _refill_s(runs)
        factors = [
            (max(MIN_FACTOR, (run.sample.decode_s - run.sample.refills * refill_s) / run.stepped_s), run.stepped_s)
            for run in runs
            if run.stepped_s
        ]
        return replace(NO_OVERHEAD, refill_s=refill_s, factor=_weighted_median(factors) if factors else 1.0)

    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        return None, sum(step_seconds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _RoundPoint:
    """The mean proposing round of a run: its draft steps and its seconds beyond the steps, over `num_rounds` rounds."""

    draft_steps: float
    seconds: float
    num_rounds: float


def _components(draft: Draft | None) -> tuple[str | None, str | None]:
    """Component digests of a draft's look-up and of its model, where it has them."""
    by_kind = {part.kind == "ngram": part.digest for part in draft.components} if draft is not None else {}
    return by_kind.get(True), by_kind.get(False)


def _refill_s(runs: Sequence[CalibrationRun]) -> float:
    """Seconds that another request's prefill adds to a request.

    In continuous batching a prefill is part of a round, and the time to a first token includes waiting for rounds and
    for other prefills, so it does not tell. The median slope over pairs of runs (Theil-Sen) of seconds per round over
    refills per round does; where runs differ too little, the shortest time to a first token is taken.
    """
    points = []
    for run in runs:
        if num_rounds := run.usage.num_idle + run.usage.num_proposing:
            points.append((run.sample.refills / num_rounds, (run.sample.decode_s - run.stepped_s) / num_rounds))
    slopes = [
        (y1 - y0) / (x1 - x0)
        for (x0, y0), (x1, y1) in itertools.combinations(sorted(points), 2)
        if x1 - x0 >= MIN_REFILL_DIFFERENCE
    ]
    return max(0.0, median(slopes)) if slopes else min(run.sample.ttft_s for run in runs)


def _model_step_s(steps: Steps, draft: Draft) -> float:
    """Seconds of a single-token step of a draft's model; 0 where it has none."""
    model = _components(draft)[1]
    return 0.0 if model is None else median(step_samples(steps, model, 1))


def _slope(points: Sequence[_RoundPoint]) -> float | None:
    """Seconds per draft step by Theil-Sen: the median slope over pairs that lie a step or more apart."""
    slopes = [
        (second.seconds - first.seconds) / (second.draft_steps - first.draft_steps)
        for first, second in itertools.permutations(points, 2)
        if second.draft_steps - first.draft_steps >= 1.0
    ]
    return median(slopes) if slopes else None


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The median of (value, weight) pairs; 0 when there is none."""
    if not values:
        return 0.0
    figures, weights = zip(*values, strict=True)
    return float(numpy.quantile(figures, 0.5, weights=weights, method="inverted_cdf"))
