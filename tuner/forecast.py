"""Acceptance x staircase -> expected speed with an interval, for any setup and any part of the prompts.

The seconds of a sequence are linear in what its rounds use: verify steps of each width, draft steps, catch-up steps,
a host overhead per round calibrated on real runs. Arithmetic on records only; nothing here is measured.
"""

from collections.abc import Mapping, Sequence

import numpy

from profiles.errors import NotMeasuredError
from profiles.formulas import Walk, acceptance_length, median, walk
from profiles.terms import PLAIN, Draft, Interval, Prompt, Setup, StepTimes, Workload
from tuner.claims import Forecast
from tuner.evidence import Evidence

RESAMPLES = 400


class Forecaster:
    """Forecasts for one workload from its evidence; walks are kept, so asking again is cheap."""

    def __init__(self, evidence: Evidence, workload: Workload, target_part: str, seed: int = 0) -> None:
        self._evidence = evidence
        self._workload = workload
        self._target_part = target_part
        self._seed = seed
        self._walks: dict[tuple[Setup, str], Walk] = {}
        self._overheads = self._calibrate()

    def forecast(self, setup: Setup, prompts: Sequence[Prompt]) -> Forecast:
        """Tokens per second and speed-up over plain decoding, with 95 % intervals; outputs of one token say nothing.

        Percentile intervals of 400 joint resamplings of prompts and of step-time samples (medians). The same draws
        serve the setup and plain decoding, so what they share cancels in the speed-up. Raises NotMeasuredError when
        evidence is missing or no output has a second token.
        """
        prompts = [prompt for prompt in prompts if len(self._evidence.traces[prompt.digest].token_ids) > 1]
        if not prompts:
            raise NotMeasuredError("no output has a second token: there is no time per token to forecast")
        rng = numpy.random.default_rng(self._seed)
        counts = numpy.full(len(prompts), 1.0 / len(prompts))
        weights = numpy.vstack([numpy.ones(len(prompts)), rng.multinomial(len(prompts), counts, RESAMPLES)])
        tokens = weights @ numpy.array([len(self._evidence.traces[prompt.digest].token_ids) - 1 for prompt in prompts])
        plain = self._seconds(PLAIN, prompts, weights)
        seconds = plain if setup == PLAIN else self._seconds(setup, prompts, weights)
        lengths: dict[tuple[int, int], float] = {}
        for prompt in prompts:
            for outcome, count in self._walk(setup, prompt).rounds.items():
                lengths[outcome] = lengths.get(outcome, 0.0) + count
        return Forecast(
            setup=setup,
            tok_per_s=_percentiles(tokens / seconds),
            speedup=_percentiles(plain / seconds),
            acceptance_length=acceptance_length(lengths) or 1.0,
        )

    def _seconds(self, setup: Setup, prompts: Sequence[Prompt], weights: numpy.ndarray) -> numpy.ndarray:
        """Total seconds per resampling; row 0 of `weights` (resamplings + 1, prompts) is the point estimate."""
        overhead = self._overheads[setup.draft]
        total = numpy.zeros(len(weights))
        uses: dict[tuple[str, int], numpy.ndarray] = {}
        for index, prompt in enumerate(prompts):
            walked = self._walk(setup, prompt)
            steps, host = count_steps(setup, walked.rounds, walked.catch_ups, self._target_part)
            total += weights[:, index] * (overhead[0] * host[0] + overhead[1] * host[1])
            for step, count in steps.items():
                uses.setdefault(step, numpy.zeros(len(weights)))
                uses[step] += weights[:, index] * count
        for (part, width), used in uses.items():
            total += used * self._resampled(part, width, len(weights))
        return total

    def _resampled(self, part: str, width: int, size: int) -> numpy.ndarray:
        """Median step seconds: the measured one first, then `size - 1` resampled ones; the same for every setup."""
        samples = numpy.array(_samples(self._evidence.steps, part, width))
        rng = numpy.random.default_rng([self._seed, width, int(part[:8], 16)])
        picks = rng.integers(0, len(samples), (size - 1, len(samples)))
        return numpy.concatenate([[numpy.median(samples)], numpy.median(samples[picks], axis=1)])

    def _walk(self, setup: Setup, prompt: Prompt) -> Walk:
        if setup.stop_below is not None:
            raise NotMeasuredError(f"{setup.name}: rounds that stop below a confidence are not replayed yet")
        key = (setup, prompt.digest)
        if key not in self._walks:
            trace = self._evidence.traces[prompt.digest]
            acceptance = None
            if setup.draft is not None:
                acceptance = self._evidence.acceptances.get((setup.draft.digest, prompt.digest))
                if acceptance is None:
                    raise NotMeasuredError(f"acceptance of {setup.draft.name} on prompt {prompt.digest} is not known")
            self._walks[key] = walk(trace, acceptance, setup.length, self._workload.max_new_tokens)
        return self._walks[key]

    def _calibrate(self) -> dict[Draft | None, tuple[float, float]]:
        """Overhead seconds (per round, per drafted token) of each draft: what real runs took beyond their steps.

        A line through the two calibrated lengths; with one length, all of it per round. The median over prompts is
        taken at each length, and drafts with a model share the median of their slopes, because a drafted token costs
        the same host work whatever the model: a single draft's slope rests on few runs and is mostly noise.
        """
        excess: dict[Setup, list[tuple[float, float]]] = {}
        for setup, sample in self._evidence.calibration:
            full = sum(count for (asked, kept), count in sample.rounds.items() if 0 < asked == kept)
            steps, (rounds, drafted) = count_steps(setup, sample.rounds, full, self._target_part)
            if rounds == 0:
                continue
            stepped = sum(n * median(_samples(self._evidence.steps, *step)) for step, n in steps.items())
            excess.setdefault(setup, []).append(((sample.decode_s - stepped) / rounds, drafted / rounds))
        points: dict[Draft | None, list[tuple[float, float]]] = {}
        for setup, values in excess.items():
            point = (median(drafted for _, drafted in values), median(seconds for seconds, _ in values))
            points.setdefault(setup.draft, []).append(point)
        modelled = {draft for draft in points if draft is not None and draft.kind != "ngram"}
        slopes = [slope for draft in modelled if (slope := _slope(points[draft])) is not None]
        shared = median(slopes) if slopes else 0.0
        lines = {None: (0.0, 0.0)} | dict.fromkeys(self._evidence.drafts, (0.0, 0.0))
        for draft, values in points.items():
            slope = shared if draft in modelled else 0.0
            lines[draft] = (median(seconds - slope * drafted for drafted, seconds in values), slope)
        return lines


def count_steps(
    setup: Setup, rounds: Mapping[tuple[int, int], float], catch_ups: float, target_part: str
) -> tuple[dict[tuple[str, int], float], tuple[float, float]]:
    """Steps that `rounds` take, by (part digest, width), and (rounds, drafted tokens) for the overhead.

    A round of d proposals costs one target step of width d + 1 and d draft steps; one step of a catch-up round is two
    tokens wide. A look-up is asked once per round, also when it proposes nothing.
    """
    steps: dict[tuple[str, int], float] = {}
    for (proposed, _), count in rounds.items():
        steps[target_part, proposed + 1] = steps.get((target_part, proposed + 1), 0.0) + count
    num_rounds = sum(rounds.values())
    drafted = sum(proposed * count for (proposed, _), count in rounds.items())
    draft = setup.draft
    if draft is not None and draft.kind == "ngram":
        steps[draft.digest, setup.length] = num_rounds
    elif draft is not None:
        steps[draft.digest, 1] = drafted - catch_ups
        steps[draft.digest, 2] = catch_ups
    return steps, (num_rounds, drafted)


def _samples(steps: Mapping[str, StepTimes], part: str, width: int) -> tuple[float, ...]:
    times = steps.get(part)
    if times is None or width not in times.samples_s:
        raise NotMeasuredError(f"step time of part {part} at width {width} is not known")
    return times.samples_s[width]


def _slope(points: list[tuple[float, float]]) -> float | None:
    """Seconds per drafted token between the shortest and the longest calibrated length; None with one length."""
    (x0, y0), (x1, y1) = min(points), max(points)
    return (y1 - y0) / (x1 - x0) if x1 - x0 >= 1.0 else None


def _percentiles(draws: numpy.ndarray) -> Interval:
    """The first draw is the estimate; the rest give the 2.5 and 97.5 % points."""
    estimate = float(draws[0])
    low, high = (float(value) for value in numpy.percentile(draws[1:], [2.5, 97.5]))
    return Interval(estimate=estimate, low=min(low, estimate), high=max(high, estimate))
