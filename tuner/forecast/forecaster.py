"""Acceptance x staircase -> expected speed with an interval, for any setup and any part of the prompts.

The seconds of a sequence are linear in what its batch ran for it: target steps of each width, draft steps, first steps
that catch up, other rows' prefills, and a host overhead per round calibrated on real runs. Arithmetic on records only;
nothing here is measured.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple

import numpy

from profiles.acceptance.batch_replay import replay, rounds_of
from profiles.acceptance.expected_rounds import NO_END, Replayed, RoundCounts, expected_rounds
from profiles.acceptance.rates import acceptance_length
from profiles.records.core import PLAIN, Draft, Interval, Setup, Workload
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import RoundCount, Sample, StepShape
from profiles.stats import median, rate_interval, speedup_interval
from tuner.forecast.evidence import LEAST_PROMPTS, QUEUE_BATCHES, Evidence, Traced
from tuner.forecast.overhead import Overhead, Use, calibrate, step_samples, use_of
from tuner.policy.estimates import Forecast, RoundSplit

RESAMPLES = 400
CALIBRATION_RESAMPLES = 40
LEAST_OF_STEPS = 0.1  # calibration by a few runs may say that a round takes less than nothing


class Forecaster:
    """Forecasts for one workload from its evidence; walks are kept, so asking again is cheap."""

    def __init__(self, evidence: Evidence, workload: Workload, target_part: str, seed: int = 0) -> None:
        self._evidence = evidence
        self._workload = workload
        self._target_part = target_part
        self._seed = seed
        self._walks: dict[tuple[Setup, str], RoundCounts] = {}
        self._replays: dict[tuple[Setup, tuple[str, ...]], list[Use]] = {}
        self._times = evidence.capabilities.times
        self._overheads = self._calibrated()

    def forecast(self, setup: Setup, prompts: Sequence[Traced]) -> Forecast:
        """Tokens per second of a row and speed-up over plain, 95 % intervals; outputs of one token say nothing.

        Percentile intervals of 400 joint resamplings of prompts, step-time samples and calibration runs. The same draws
        serve the setup and plain decoding, so what they share cancels in the speed-up. Of a draft that was only run the
        runs speak for themselves. Raises NotMeasuredError when evidence is missing or no output has a second token.
        """
        if setup.draft is not None and not self._evidence.traces_of(setup.draft):
            return self._seen(setup)
        prompts = [prompt for prompt in prompts if len(self._evidence.traces[prompt.digest].token_ids) > 1]
        if not prompts:
            raise NotMeasuredError("no output has a second token: there is no time per token to forecast")
        rng = numpy.random.default_rng(self._seed)
        counts = numpy.full(len(prompts), 1.0 / len(prompts))
        weights = numpy.vstack([numpy.ones(len(prompts)), rng.multinomial(len(prompts), counts, RESAMPLES)])
        tokens = weights @ numpy.array([len(self._evidence.traces[prompt.digest].token_ids) - 1 for prompt in prompts])
        plain = self._seconds(PLAIN, prompts, weights)
        seconds = plain if setup == PLAIN else self._seconds(setup, prompts, weights)
        return Forecast(
            setup=setup,
            tok_per_s=_percentiles(tokens / seconds),
            speedup=_percentiles(plain / seconds),
            acceptance_length=acceptance_length(self.rounds(setup, prompts).rounds) or 1.0,
        )

    def _seen(self, setup: Setup) -> Forecast:
        """What real runs of a setup came to, against plain decoding of the same prompts, whatever their domain."""
        runs = self._evidence.calibration
        chosen, plain = (
            [sample for own, sample in runs if own == wanted and sample.output_tokens > 1] for wanted in (setup, PLAIN)
        )
        both = self._evidence.prompts_of(setup) & self._evidence.prompts_of(PLAIN)
        if len(both) < LEAST_PROMPTS:
            raise NotMeasuredError(
                f"{setup.name} was run on {len(both)} prompts that have a second token: {LEAST_PROMPTS} are needed"
            )
        columns = [_columns_by_prompt(samples, sorted(both)) for samples in (plain, chosen)]
        speedup, _ = speedup_interval(*columns[0], *columns[1])
        return Forecast(
            setup=setup,
            tok_per_s=rate_interval(*columns[1]),
            speedup=speedup,
            acceptance_length=acceptance_length(_rounds_of(chosen)),
        )

    def round_s(self, setup: Setup, shape: StepShape) -> float:
        """Seconds of one round of a `shape` (see `Sample`), overhead included.

        A first step of a draft model wider than any that was timed is priced in proportion to the widest.
        """
        use = use_of(setup, {shape: 1.0}, 0.0, self._target_part, self._times)
        rates = self._rates(setup.draft)
        stepped_s = float(rates[4, 0]) * sum(
            count * self.step_s(part, width) for (part, width), count in use.steps.items()
        )
        beyond_s = float(use.overhead_s(rates)[0])
        return max(stepped_s + beyond_s, LEAST_OF_STEPS * stepped_s)

    def step_s(self, part: str, width: int) -> float:
        """Seconds of one step of the target, or of a draft's part: there beyond the widest timed in proportion to it.

        Raises NotMeasuredError for a part that was not timed, and for a width of the target that was not.
        """
        timed = width
        if part != self._target_part and part in self._evidence.steps:
            widths = self._evidence.steps[part].samples_s
            timed = width if width in widths else max(other for other in widths if other < width)
        return width / timed * median(step_samples(self._evidence.steps, part, timed))

    def refill_s(self, draft: Draft | None) -> float:
        """Seconds of a row's prefill, the draft's included, which the other rows of a batch wait for."""
        return float(self._rates(draft)[3, 0])

    def rounds(self, setup: Setup, prompts: Sequence[Traced]) -> RoundCounts:
        """The rounds of these prompts, each alone in its batch, added up."""
        rounds: Counter[RoundCount] = Counter()
        shapes: Counter[StepShape] = Counter()
        for prompt in prompts:
            walked = self._walk(setup, prompt)
            rounds.update(walked.rounds)
            shapes.update(walked.shapes)
        return RoundCounts(rounds=rounds, shapes=shapes)

    def split(self, setup: Setup, prompts: Sequence[Traced]) -> RoundSplit:
        """Where a mean round's time goes. Raises NotMeasuredError when no prompt has a round, or none was traced."""
        whole = self._times == "rounds"
        parts = {"draft": 0.0, "verify": 0.0, "overhead": 0.0}
        num_rounds, rates = 0.0, self._rates(setup.draft)
        factor = float(rates[4, 0])
        for use in self._uses(setup, prompts):
            num_rounds += use.idle + use.proposing
            parts["overhead"] += float(use.overhead_s(rates)[0])
            for (part, width), count in use.steps.items():
                seconds = factor * count * median(step_samples(self._evidence.steps, part, width))
                parts["verify" if whole or part == self._target_part else "draft"] += seconds
        if num_rounds == 0.0:
            raise NotMeasuredError(f"{setup.name}: no output has a second token, so there is no round to look into")
        draft_s, verify_s, overhead_s = (seconds / num_rounds for seconds in parts.values())
        return RoundSplit(draft_s=None if whole else draft_s, verify_s=verify_s, overhead_s=overhead_s)

    def _seconds(self, setup: Setup, prompts: Sequence[Traced], weights: numpy.ndarray) -> numpy.ndarray:
        """Total seconds per resampling; row 0 of `weights` (resamplings + 1, prompts) is the point estimate."""
        total, rates = numpy.zeros(len(weights)), self._rates(setup.draft)
        uses: dict[tuple[str, int], numpy.ndarray] = {}
        for index, use in enumerate(self._uses(setup, prompts)):
            total += weights[:, index] * use.overhead_s(rates)
            for step, count in use.steps.items():
                uses.setdefault(step, numpy.zeros(len(weights)))
                uses[step] += weights[:, index] * count
        for (part, width), used in uses.items():
            total += used * rates[4] * self._resampled(part, width, len(weights))
        return total

    def _resampled(self, part: str, width: int, size: int) -> numpy.ndarray:
        """Median step seconds: the measured one first, then `size - 1` resampled ones; the same for every setup."""
        samples = numpy.array(step_samples(self._evidence.steps, part, width))
        rng = numpy.random.default_rng([self._seed, width, int(part[:8], 16)])
        picks = rng.integers(0, len(samples), (size - 1, len(samples)))
        return numpy.concatenate([[numpy.median(samples)], numpy.median(samples[picks], axis=1)])

    def _uses(self, setup: Setup, prompts: Sequence[Traced]) -> list[Use]:
        """What every prompt's rounds use: alone by its walk, in a batch by a replay of the prompts as a full queue."""
        if self._workload.batch_size == 1:
            walks = [self._walk(setup, prompt) for prompt in prompts]
            return [use_of(setup, walked.shapes, 0.0, self._target_part, self._times) for walked in walks]
        key = (setup, tuple(prompt.digest for prompt in prompts))
        if key not in self._replays:
            self._replays[key] = self._replay(setup, prompts)
        return self._replays[key]

    def _replay(self, setup: Setup, prompts: Sequence[Traced]) -> list[Use]:
        """The mean of each prompt's turns in a queue as long as those of real runs, in which every prompt has one."""
        size = max(QUEUE_BATCHES * self._workload.batch_size, len(prompts))
        luck = random.Random(f"{self._seed} {setup.digest}")
        queue = [
            rounds_of(
                self._evidence.traces[prompt.digest],
                self._acceptance(setup, prompt),
                setup.length,
                NO_END if self._evidence.capabilities.past_end else self._workload.max_new_tokens,
                luck,
            )
            for prompt in itertools.islice(itertools.cycle(prompts), size)
        ]
        runs = replay(queue, self._workload.batch_size, self._evidence.capabilities)
        uses = []
        for index in range(len(prompts)):
            own = runs[index :: len(prompts)]
            shapes: Counter[StepShape] = Counter()
            for run in own:
                shapes.update(run.shapes)
            mean = {shape: count / len(own) for shape, count in shapes.items()}
            refills = sum(run.refills for run in own) / len(own)
            uses.append(use_of(setup, mean, refills, self._target_part, self._times))
        return uses

    def _acceptance(self, setup: Setup, prompt: Traced) -> Replayed | None:
        if setup.stop_below is not None:
            raise NotMeasuredError(f"{setup.name}: rounds that stop below a confidence are not replayed yet")
        if setup.draft is not None and not self._evidence.traces_of(setup.draft):
            raise NotMeasuredError(f"{setup.name}: its acceptance was not traced, it was only run")
        return None if setup.draft is None else self._evidence.acceptance(setup.draft, prompt)

    def _walk(self, setup: Setup, prompt: Traced) -> RoundCounts:
        key = (setup, prompt.digest)
        if key not in self._walks:
            trace, acceptance = self._evidence.traces[prompt.digest], self._acceptance(setup, prompt)
            past_end = self._evidence.capabilities.past_end
            self._walks[key] = expected_rounds(
                trace, acceptance, setup.length, self._workload.max_new_tokens, past_end=past_end
            )
        return self._walks[key]

    def _rates(self, draft: Draft | None) -> numpy.ndarray:
        if draft not in self._overheads:
            raise NotMeasuredError(f"draft {draft.name if draft else PLAIN.name} was not run at this load")
        return self._overheads[draft]

    def _calibrated(self) -> dict[Draft | None, numpy.ndarray]:
        """Overhead rates per draft, (5, resamplings + 1): all calibration runs first, then resampled ones."""
        traced = [one for one in self._evidence.calibration if self._is_priced(one[0])]
        by_setup: dict[Setup, list[Sample]] = {}
        for setup, sample in traced:
            by_setup.setdefault(setup, []).append(sample)
        rng = numpy.random.default_rng(self._seed)
        variants = [traced]
        for _ in range(CALIBRATION_RESAMPLES):
            variants.append(
                [(setup, own[pick]) for setup, own in by_setup.items() for pick in rng.integers(0, len(own), len(own))]
            )
        rates = [calibrate(self._evidence.steps, variant, self._target_part, self._times) for variant in variants]
        order = [0, *(1 + draw % CALIBRATION_RESAMPLES for draw in range(RESAMPLES))]
        return {
            draft: numpy.array([astuple(rates[number].get(draft, Overhead())) for number in order]).T
            for draft in (None, *self._evidence.drafts)
            if draft is None or self._evidence.traces_of(draft)
        }

    def _is_priced(self, setup: Setup) -> bool:
        return setup.draft is None or self._evidence.traces_of(setup.draft)


def _columns_by_prompt(samples: Sequence[Sample], prompts: Sequence[str]) -> tuple[list[float], list[int]]:
    """Decode seconds and tokens after the first, over all runs of each prompt."""
    own = [[sample for sample in samples if sample.prompt_digest == prompt] for prompt in prompts]
    seconds = [sum(sample.decode_s for sample in runs) for runs in own]
    return seconds, [sum(sample.output_tokens - 1 for sample in runs) for runs in own]


def _rounds_of(samples: Sequence[Sample]) -> Counter[RoundCount]:
    rounds: Counter[RoundCount] = Counter()
    for sample in samples:
        rounds.update(sample.rounds)
    return rounds


def _percentiles(draws: numpy.ndarray) -> Interval:
    """The first draw is the estimate; the rest give the 2.5 and 97.5 % points."""
    estimate = float(draws[0])
    low, high = (float(value) for value in numpy.percentile(draws[1:], [2.5, 97.5]))
    return Interval(estimate=estimate, low=min(low, estimate), high=max(high, estimate))
