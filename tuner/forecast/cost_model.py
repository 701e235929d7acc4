"""What rounds cost: the steps they use, and the overhead beyond these, calibrated on a few real runs.

A step timed alone is not a step within a round: caches are warmer in a row of draft steps, and the decoding loop costs
time of its own. There are two cost models, because some engines let the steps of target and draft be timed apart and
others only whole rounds.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP
from profiles.engines.base import EngineCapabilities
from profiles.records.core import Draft, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Sample, StepShape, StepTimes, between_widths
from profiles.stats import median

MIN_REFILL_DIFFERENCE = 0.05  # refills per round by which two runs must differ to show what a refill takes
MIN_FACTOR = 0.1  # a few disturbed runs may claim that rounds take next to nothing

Steps = Mapping[str, StepTimes]  # by component digest
Shapes = Mapping[StepShape, float]
Seconds: TypeAlias = Any  # a float, or an array of resamplings


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What rounds use: steps by (component digest, width), rounds without and with proposals, draft steps, refills.

    `num_modelled`: of the rounds with proposals those whose proposals are a draft model's.
    """

    steps: Mapping[tuple[str, int], float]
    num_idle: float
    num_proposing: float
    num_draft_steps: float = 0.0
    num_refills: float = 0.0
    num_modelled: float = 0.0

    @property
    def num_rounds(self) -> float:
        return self.num_idle + self.num_proposing


class Overhead(NamedTuple):
    """Seconds beyond the steps: per round without a proposal, round with one, draft step, and prefill of another row.

    `factor` multiplies the time that steps were measured at. `ttft_s` is the time to the first token of a request.
    `modelled_s` adds to a round of a composite in which its model drafts.
    """

    idle_s: Seconds = 0.0
    proposing_s: Seconds = 0.0
    draft_step_s: Seconds = 0.0
    refill_s: Seconds = 0.0
    factor: Seconds = 1.0
    ttft_s: Seconds = 0.0
    modelled_s: Seconds = 0.0

    def beyond_steps_s(self, usage: Usage) -> Seconds:
        """Seconds that rounds with this usage take in addition to their steps."""
        per_round = usage.num_idle * self.idle_s + usage.num_proposing * self.proposing_s
        per_round += usage.num_modelled * self.modelled_s
        return per_round + usage.num_draft_steps * self.draft_step_s + usage.num_refills * self.refill_s


class Run(NamedTuple):
    """A calibration run, what it used, and the seconds of its steps as they were timed."""

    sample: Sample
    usage: Usage
    stepped_s: float


def composed(lookup: Overhead, model: Overhead) -> Overhead:
    """The overhead of a composite, whose rounds are its look-up's or its model's."""
    return model._replace(proposing_s=lookup.proposing_s, modelled_s=model.proposing_s - lookup.proposing_s)


RunsByDraft = Mapping[Draft | None, Sequence[Run]]


class CostModel(ABC):
    """How rounds become seconds on one kind of engine."""

    calibration_prompts: ClassVar[int]  # at batch 1

    def __init__(self, target_component: str) -> None:
        self.target_component = target_component

    def calibrate(self, steps: Steps, runs: Iterable[tuple[Setup, Sample]]) -> dict[Draft | None, Overhead]:
        """The overhead of plain decoding (None) and of every draft that was run.

        Raises:
            NotMeasuredError: a run does not tell the shapes of its rounds, or uses a step that was never timed.
        """
        by_draft: dict[Draft | None, list[Run]] = {}
        for setup, sample in runs:
            if sample.rounds and not sample.shapes:
                raise NotMeasuredError(f"a run of {setup.name} does not say what its rounds ran: measure it again")
            usage = self.usage(setup, sample.shapes, sample.refills)
            stepped_s = sum(count * median(step_samples(steps, *step)) for step, count in usage.steps.items())
            by_draft.setdefault(setup.draft, []).append(Run(sample, usage, stepped_s))
        is_alone = steps[self.target_component].batch_size == 1
        overheads = self._overheads(steps, _without_drift(by_draft) if is_alone else by_draft)
        for draft, of_draft in by_draft.items():
            ttft_s = median(run.sample.ttft_s for run in of_draft)
            overheads[draft] = overheads[draft]._replace(ttft_s=ttft_s)
        return overheads

    def complete(self, steps: Steps) -> Steps:
        """Adds the step times that the engine cannot measure but forecasts need."""
        return steps

    @abstractmethod
    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """What rounds of these shapes use."""

    @abstractmethod
    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        """Seconds by component as (drafting, verifying); drafting is None where the two are not told apart."""

    @abstractmethod
    def _overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead]: ...


def cost_model_of(capabilities: EngineCapabilities, target_component: str) -> CostModel:
    """The cost model for what the engine can time."""
    return {"steps": StepCostModel, "rounds": RoundCostModel}[capabilities.times](target_component)


def step_samples(steps: Steps, component: str, width: int) -> tuple[float, ...]:
    """Measured seconds of one step. Raises NotMeasuredError when it was never timed."""
    times = steps.get(component)
    if times is None or width not in times.samples_s:
        raise NotMeasuredError(f"the step time of component {component} at width {width} was not measured")
    return times.samples_s[width]


class StepCostModel(CostModel):
    """Steps of target and draft are timed apart.

    Per step of a draft model, drafts share one overhead *relative to their own step*: what a row of steps saves over
    single ones is a share of the step, and one draft's line through two lengths is mostly noise. The rest is per round
    that proposed; a draft whose runs never proposed is charged a plain round's. A round without a proposal costs what a
    plain round costs, whatever the draft.
    """

    calibration_prompts = 3

    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """A look-up is asked once per round, also when it proposes nothing.

        A first draft step wider than the widest that is timed counts as several steps of that width.
        """
        steps: defaultdict[tuple[str, int], float] = defaultdict(float)
        num_idle = num_proposing = num_draft_steps = num_modelled = 0.0
        lookup, model = _components(setup.draft)
        for shape, count in shapes.items():
            steps[self.target_component, shape.target_width] += count
            if shape.target_width > 1:
                num_proposing += count
            else:
                num_idle += count
            if lookup is not None:
                steps[lookup, setup.length] += count
            if model is not None and shape.draft_steps > 0:
                widest = min(shape.first_draft_width, WIDEST_CATCH_UP)
                steps[model, widest] += count * shape.first_draft_width / widest
                steps[model, 1] += count * (shape.draft_steps - 1)
                num_draft_steps += count * shape.draft_steps
                num_modelled += count if shape.target_width > 1 else 0.0
        return Usage(
            steps={step: count for step, count in steps.items() if count},
            num_idle=num_idle,
            num_proposing=num_proposing,
            num_draft_steps=num_draft_steps,
            num_refills=num_refills,
            num_modelled=num_modelled,
        )

    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        verifying_s = step_seconds.get(self.target_component, 0.0)
        return sum(step_seconds.values()) - verifying_s, verifying_s

    def _overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead]:
        refill_s = {draft: _refill_s(of_draft) for draft, of_draft in runs.items()}

        def beyond_s(draft: Draft | None, run: Run) -> float:
            return run.sample.decode_s - run.stepped_s - run.sample.refills * refill_s[draft]

        idle_s = _weighted_median(
            (beyond_s(None, run) / run.usage.num_idle, run.usage.num_idle)
            for run in runs.get(None, ())
            if run.usage.num_idle
        )
        rounds = {
            draft: [
                _MeanRound(
                    draft_steps=run.usage.num_draft_steps / run.usage.num_proposing,
                    seconds=(beyond_s(draft, run) - run.usage.num_idle * idle_s) / run.usage.num_proposing,
                    num_rounds=run.usage.num_proposing,
                )
                for run in of_draft
                if run.usage.num_proposing
            ]
            for draft, of_draft in runs.items()
            if draft is not None
        }
        step_s = {draft: _model_step_s(steps, draft) for draft in rounds}
        shares = []  # by Theil-Sen: the median slope over pairs of runs that lie a step or more apart
        for draft, points in rounds.items():
            slopes = _slopes([(point.draft_steps, point.seconds) for point in points], 1.0) if step_s[draft] else []
            shares += [median(slopes) / step_s[draft]] if slopes else []
        share = median(shares) if shares else 0.0
        overheads: dict[Draft | None, Overhead] = {None: Overhead(idle_s=idle_s, refill_s=refill_s.get(None, 0.0))}
        for draft, points in rounds.items():
            draft_step_s = share * step_s[draft]
            proposing_s = _weighted_median(
                (point.seconds - draft_step_s * point.draft_steps, point.num_rounds) for point in points
            )
            overheads[draft] = Overhead(idle_s, proposing_s if points else idle_s, draft_step_s, refill_s[draft])
        return overheads


class RoundCostModel(CostModel):
    """Only whole rounds are timed, of plain decoding and of every draft at each length.

    A timed round has the decoding loop in it; rounds of real texts take a multiple of it, because their lengths differ.
    So a draft has a factor on its timed rounds and nothing else but its prefills.
    """

    calibration_prompts = 6  # they are the only check of the timed rounds, and runs are short

    def complete(self, steps: Steps) -> Steps:
        """Adds rounds without a proposal (a plain round, if the draft always proposes) and widths between those timed.

        Every width drafts and verifies one token more, so quantiles lie on a line between two timed widths.
        """
        plain_s = steps[self.target_component].samples_s[1]
        return {
            component: replace(times, samples_s=_interpolated({1: plain_s, **times.samples_s}))
            for component, times in steps.items()
        }

    def usage(self, setup: Setup, shapes: Shapes, num_refills: float) -> Usage:
        """Each round is one step, of plain decoding or of the draft, as wide as the tokens it verifies.

        The model of a composite drafts in every round, whose width then counts as the look-up's rounds say.
        """
        lookup, model = _components(setup.draft)
        steps: defaultdict[tuple[str, int], float] = defaultdict(float)
        for shape, count in shapes.items():
            if lookup is None or model is None:
                steps[model or lookup or self.target_component, shape.target_width] += count
            else:
                steps[model, setup.length + 1] += count
                steps[lookup, shape.target_width] += count
                steps[lookup, setup.length + 1] -= count
        num_idle = sum(count for shape, count in shapes.items() if shape.target_width == 1)
        return Usage(
            steps={step: count for step, count in steps.items() if count},
            num_idle=num_idle,
            num_proposing=sum(shapes.values()) - num_idle,
            num_refills=num_refills,
        )

    def split(self, step_seconds: Mapping[str, float]) -> tuple[float | None, float]:
        return None, sum(step_seconds.values())

    def _overheads(self, steps: Steps, runs: RunsByDraft) -> dict[Draft | None, Overhead]:  # noqa: ARG002
        overheads: dict[Draft | None, Overhead] = {}
        for draft, of_draft in runs.items():
            refill_s = _refill_s(of_draft)
            factors = [
                (max(MIN_FACTOR, (run.sample.decode_s - run.sample.refills * refill_s) / run.stepped_s), run.stepped_s)
                for run in of_draft
                if run.stepped_s
            ]
            overheads[draft] = Overhead(refill_s=refill_s, factor=_weighted_median(factors) if factors else 1.0)
        return overheads


def _interpolated(samples_s: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, ...]]:
    """Seconds by width, without a gap between widths."""
    num_samples = min(map(len, samples_s.values()))
    levels = (numpy.arange(num_samples) + 0.5) / num_samples
    quantiles = {width: numpy.quantile(seconds, levels) for width, seconds in samples_s.items()}
    return {
        width: tuple(samples_s[width] if width in samples_s else between_widths(quantiles, width).tolist())
        for width in range(min(samples_s), max(samples_s) + 1)
    }


class _MeanRound(NamedTuple):
    """The mean proposing round of a run."""

    draft_steps: float
    seconds: float  # beyond its steps
    num_rounds: float


def _without_drift(runs: RunsByDraft) -> RunsByDraft:
    """Runs of single prompts without what the machine's drift did to some drafts' and not to others'.

    The runs of a draft lie seconds apart from those of the others; meanwhile a machine may change by more than drafts
    differ in what they take beyond their steps. Offsets of drafts, in the log of measured over stepped seconds beside
    the other runs of the same prompt, are therefore kept in the proportion of their variance to that with noise
    (empirical Bayes, as in DerSimonian and Laird 1986); without noise they are kept whole.
    """
    logs: dict[Draft | None, dict[str, list[float]]] = {draft: defaultdict(list) for draft in runs}
    for draft, of_draft in runs.items():
        for run in of_draft:
            if run.stepped_s > 0.0 and run.sample.decode_s > 0.0:
                logs[draft][run.sample.prompt_digest].append(math.log(run.sample.decode_s / run.stepped_s))
    cells = {(draft, prompt): fmean(values) for draft, row in logs.items() for prompt, values in row.items()}
    prompts = {prompt for _, prompt in cells}
    level = {prompt: fmean(value for (_, other), value in cells.items() if other == prompt) for prompt in prompts}
    offsets = {
        draft: fmean(cells[draft, prompt] - level[prompt] for prompt in row) for draft, row in logs.items() if row
    }
    freedom = len(cells) - len(prompts) - len(offsets) + 1
    if freedom < 1 or len(offsets) < 2:
        return runs
    noise = sum((value - level[prompt] - offsets[draft]) ** 2 for (draft, prompt), value in cells.items()) / freedom
    # plain decoding runs all over a prompt's time, a draft's lengths follow each other
    errors = {draft: noise / (len(logs[draft]) if draft else sum(map(len, logs[draft].values()))) for draft in offsets}
    spread = max(0.0, sum(offset**2 for offset in offsets.values()) / (len(offsets) - 1) - fmean(errors.values()))
    scales = {
        draft: math.exp(-offset * error / (spread + error)) if (error := errors[draft]) > 0.0 else 1.0
        for draft, offset in offsets.items()
    }
    return {
        draft: [
            run._replace(sample=replace(run.sample, decode_s=run.sample.decode_s * scales.get(draft, 1.0)))
            for run in of_draft
        ]
        for draft, of_draft in runs.items()
    }


def _components(draft: Draft | None) -> tuple[str | None, str | None]:
    """Component digests of a draft's look-up and of its model, where it has them."""
    by_kind = {part.kind == "ngram": part.digest for part in draft.components} if draft is not None else {}
    return by_kind.get(True), by_kind.get(False)


def _refill_s(runs: Sequence[Run]) -> float:
    """Seconds that another request's prefill adds to a request.

    In a batch the time to a first token includes waiting for other prefills (on a server for rounds too), so it does
    not tell. The median slope over pairs of runs (Theil-Sen) of seconds per round over refills per round does; where
    runs differ too little, the shortest time to a first token is taken.
    """
    points = [
        (run.sample.refills / run.usage.num_rounds, (run.sample.decode_s - run.stepped_s) / run.usage.num_rounds)
        for run in runs
        if run.usage.num_rounds
    ]
    slopes = _slopes(points, MIN_REFILL_DIFFERENCE)
    return max(0.0, median(slopes)) if slopes else min(run.sample.ttft_s for run in runs)


def _model_step_s(steps: Steps, draft: Draft) -> float:
    """Seconds of a single-token step of a draft's model; 0 where it has none."""
    model = _components(draft)[1]
    return 0.0 if model is None else median(step_samples(steps, model, 1))


def _slopes(points: Sequence[tuple[float, float]], min_distance: float) -> list[float]:
    pairs = itertools.combinations(sorted(points), 2)
    return [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs if x1 - x0 >= min_distance]


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The median of (value, weight) pairs; 0 when there is none."""
    pairs = list(values)
    if not pairs:
        return 0.0
    figures, weights = zip(*pairs, strict=True)
    return float(numpy.quantile(figures, 0.5, weights=weights, method="inverted_cdf"))
