"""Forecasts the speed of any setup on any of the traced prompts, with an interval.

The seconds of a sequence are linear in what its batch ran for it: target steps of each width, draft steps, first draft
steps that catch up, other rows' prefills, and the overhead that a few real runs calibrate. Nothing is measured here.
"""

import copy
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy

from profiles.acceptance.batch_replay import draw_rounds, replay
from profiles.acceptance.expected_rounds import NO_END, DraftAcceptance, RoundCounts, expected_rounds
from profiles.acceptance.rates import acceptance_length
from profiles.records.core import PLAIN, Draft, Interval, Setup, Workload
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import RoundCount, Sample, StepShape
from profiles.stats import median, rate_interval, speedup_interval, strata_members
from tuner.forecast.cost_model import Overhead, Usage, composed, cost_model_of, step_samples
from tuner.forecast.evidence import MIN_PROMPTS, Evidence, HasDigest
from tuner.policy.estimates import Forecast, Objective, RoundSplit

RESAMPLES = 400
CALIBRATION_RESAMPLES = 40
QUEUE_BATCHES = 4  # of a queue that keeps the batch full
MIN_STEP_SHARE = 0.1  # calibration on a few runs may claim that a round takes less than nothing


class Forecaster:
    """Forecasts for one workload from its evidence; expected rounds are cached, so repeated questions are cheap."""

    def __init__(
        self,
        evidence: Evidence,
        workload: Workload,
        target_component: str,
        seed: int = 0,
        *,
        objective: Objective = "tpot",
    ) -> None:
        self._evidence = evidence
        self._workload = workload
        self._target_component = target_component
        self._seed = seed
        self._end_to_end = objective == "throughput"
        self._cost_model = cost_model_of(evidence.capabilities, target_component)
        self._steps = self._cost_model.complete(evidence.steps)
        self._rounds: dict[tuple[Setup, str], RoundCounts] = {}
        self._replays: dict[tuple[Setup, tuple[str, ...]], list[Usage]] = {}
        self._overheads, self._overhead_draws = self._calibrated()

    def forecast(self, setup: Setup, prompts: Sequence[HasDigest]) -> Forecast:
        """Tokens per second of a row while it decodes, and speed-up over plain decoding, with 95 % intervals.

        The speed-up is of decoding, or of whole requests where the objective is throughput.

        Percentile intervals of 400 joint resamplings of prompts within their domains, whose shares are fixed, of
        step-time samples and of calibration runs. The same draws serve the setup and plain decoding, so what they share
        cancels in the speed-up. Outputs of one token are left out. For a draft that was only run, its runs are the
        forecast.

        Raises:
            NotMeasuredError: evidence is missing, or no output has a second token.
        """
        if not self._evidence.is_traced(setup.draft):
            return self._forecast_from_runs(setup)
        prompts = [prompt for prompt in prompts if len(self._evidence.traces[prompt.digest].token_ids) > 1]
        if not prompts:
            raise NotMeasuredError("no output has a second token: there is no time per token to forecast")
        weights = self._weights(prompts)
        tokens = weights @ numpy.array([len(self._evidence.traces[prompt.digest].token_ids) - 1 for prompt in prompts])
        plain_s = self._seconds(PLAIN, prompts, weights)
        seconds = plain_s if setup == PLAIN else self._seconds(setup, prompts, weights)
        prefill_s, plain_prefill_s = (self._prefill_s(draft, weights) for draft in (setup.draft, None))
        return Forecast(
            setup=setup,
            tok_per_s=_percentiles(tokens / seconds),
            speedup=_percentiles((plain_s + plain_prefill_s) / (seconds + prefill_s)),
            acceptance_length=acceptance_length(self.rounds(setup, prompts).rounds) or 1.0,
        )

    def _weights(self, prompts: Sequence[HasDigest]) -> numpy.ndarray:
        """How often each prompt counts: once, then in each of the resamplings within domains."""
        rng = numpy.random.default_rng(self._seed)
        weights = numpy.ones((1 + RESAMPLES, len(prompts)))
        for members in strata_members([getattr(prompt, "domain", None) for prompt in prompts]):
            shares = numpy.full(len(members), 1.0 / len(members))
            weights[1:, members] = rng.multinomial(len(members), shares, RESAMPLES)
        return weights

    def extended(self, evidence: Evidence) -> "Forecaster":
        """The same forecaster over evidence of more prompts."""
        forecaster = copy.copy(self)
        forecaster._evidence = evidence
        return forecaster

    def prompt_seconds(
        self, setup: Setup, prompts: Sequence[HasDigest], *, end_to_end: bool = False
    ) -> dict[str, float]:
        """Seconds of decoding each prompt, or of its whole request, by prompt digest; in order and without intervals.

        Prompts whose output has one token have no seconds of decoding.
        """
        traces = self._evidence.traces
        prompts = [prompt for prompt in prompts if end_to_end or len(traces[prompt.digest].token_ids) > 1]
        overhead = self._overhead(setup.draft)
        before_s = overhead.ttft_s if end_to_end else 0.0
        return {
            prompt.digest: before_s + self._stepped_s(overhead, usage) + overhead.beyond_steps_s(usage)
            for prompt, usage in zip(prompts, self._usages(setup, prompts), strict=True)
        }

    def _forecast_from_runs(self, setup: Setup) -> Forecast:
        """What real runs of a setup came to against plain decoding of the same prompts, over all domains."""
        shared = sorted(self._evidence.timed_prompts(setup) & self._evidence.timed_prompts(PLAIN))
        if len(shared) < MIN_PROMPTS:
            raise NotMeasuredError(
                f"{setup.name} was run on {len(shared)} prompts that have a second token: {MIN_PROMPTS} are needed"
            )
        plain_columns, columns = (self._columns_by_prompt(wanted, shared) for wanted in (PLAIN, setup))
        compared = [plain_columns, columns]
        if self._end_to_end:
            compared = [self._columns_by_prompt(wanted, shared, end_to_end=True) for wanted in (PLAIN, setup)]
        domains = {prompt.digest: prompt.domain for prompt in self._evidence.prompts}
        speedup, _ = speedup_interval(*compared[0], *compared[1], strata=[domains[digest] for digest in shared])
        rounds: Counter[RoundCount] = Counter()
        for run in self._runs(setup):
            rounds.update(run.rounds)
        return Forecast(
            setup=setup,
            tok_per_s=rate_interval(*columns),
            speedup=speedup,
            acceptance_length=acceptance_length(rounds),
        )

    def _runs(self, setup: Setup) -> list[Sample]:
        return [run for other, run in self._evidence.calibration if other == setup and run.output_tokens > 1]

    def _columns_by_prompt(
        self, setup: Setup, prompts: Sequence[str], *, end_to_end: bool = False
    ) -> tuple[list[float], list[int]]:
        """Decode seconds and tokens after the first, or all of them, over all runs of each prompt."""
        by_prompt = [[run for run in self._runs(setup) if run.prompt_digest == prompt] for prompt in prompts]
        seconds = [sum(run.decode_s + (run.ttft_s if end_to_end else 0.0) for run in runs) for runs in by_prompt]
        return seconds, [sum(run.output_tokens - (not end_to_end) for run in runs) for runs in by_prompt]

    def _prefill_s(self, draft: Draft | None, weights: numpy.ndarray) -> numpy.ndarray:
        """Seconds before the first tokens per resampling; 0 where only decoding is compared."""
        ttft_s = self._overhead_draws[draft].ttft_s if self._end_to_end else 0.0
        prefill_s: numpy.ndarray = weights.sum(axis=1) * ttft_s
        return prefill_s

    def round_s(self, setup: Setup, shape: StepShape) -> float:
        """Seconds of one round of this shape (see `Sample.shapes`), overhead included.

        A first step of a draft model wider than any that was timed is priced in proportion to the widest.
        """
        usage = self._cost_model.usage(setup, {shape: 1.0}, 0.0)
        overhead = self._overhead(setup.draft)
        stepped_s = self._stepped_s(overhead, usage)
        return float(max(stepped_s + overhead.beyond_steps_s(usage), MIN_STEP_SHARE * stepped_s))

    def _stepped_s(self, overhead: Overhead, usage: Usage) -> float:
        return float(overhead.factor) * sum(count * self.step_s(*step) for step, count in usage.steps.items())

    def step_s(self, component: str, width: int) -> float:
        """Seconds of one step of the target or of a draft's component.

        A draft's step beyond the widest that was timed is priced in proportion to it.

        Raises:
            NotMeasuredError: the component, or this width of the target, was not timed.
        """
        timed = width
        if component != self._target_component and component in self._steps:
            widths = self._steps[component].samples_s
            timed = width if width in widths else max(other for other in widths if other < width)
        return width / timed * median(step_samples(self._steps, component, timed))

    def refill_s(self, draft: Draft | None) -> float:
        """Seconds of a row's prefill, the draft's included, which the other rows of a batch wait for."""
        return float(self._overhead(draft).refill_s)

    def rounds(self, setup: Setup, prompts: Sequence[HasDigest]) -> RoundCounts:
        """The expected rounds of these prompts, each alone in its batch, added up."""
        rounds: Counter[RoundCount] = Counter()
        shapes: Counter[StepShape] = Counter()
        for prompt in prompts:
            expected = self._expected_rounds(setup, prompt)
            rounds.update(expected.rounds)
            shapes.update(expected.shapes)
        return RoundCounts(rounds=rounds, shapes=shapes)

    def split(self, setup: Setup, prompts: Sequence[HasDigest]) -> RoundSplit:
        """Where the time of a mean round goes. Raises NotMeasuredError when no prompt has a round or a trace."""
        overhead = self._overhead(setup.draft)
        step_seconds: Counter[str] = Counter()
        num_rounds = beyond_s = 0.0
        for usage in self._usages(setup, prompts):
            num_rounds += usage.num_rounds
            beyond_s += overhead.beyond_steps_s(usage)
            for (component, width), count in usage.steps.items():
                samples = step_samples(self._steps, component, width)
                step_seconds[component] += overhead.factor * count * median(samples)
        if num_rounds == 0.0:
            raise NotMeasuredError(f"{setup.name}: no output has a second token, so there is no round to split")
        draft_s, verify_s = self._cost_model.split(step_seconds)
        return RoundSplit(
            draft_s=None if draft_s is None else draft_s / num_rounds,
            verify_s=verify_s / num_rounds,
            overhead_s=beyond_s / num_rounds,
        )

    def _seconds(self, setup: Setup, prompts: Sequence[HasDigest], weights: numpy.ndarray) -> numpy.ndarray:
        """Total seconds per resampling; row 0 of `weights` (resamplings + 1, prompts) is the point estimate."""
        self._overhead(setup.draft)
        overhead = self._overhead_draws[setup.draft]
        total = numpy.zeros(len(weights))
        counts: dict[tuple[str, int], numpy.ndarray] = {}
        for index, usage in enumerate(self._usages(setup, prompts)):
            total += weights[:, index] * overhead.beyond_steps_s(usage)
            for step, count in usage.steps.items():
                counts[step] = counts.get(step, 0.0) + weights[:, index] * count
        for (component, width), used in counts.items():
            total += used * overhead.factor * self._resampled_step_s(component, width, len(weights))
        return total

    def _resampled_step_s(self, component: str, width: int, size: int) -> numpy.ndarray:
        """Median step seconds: the measured one first, then `size - 1` resampled ones; the same for every setup."""
        samples = numpy.array(step_samples(self._steps, component, width))
        rng = numpy.random.default_rng([self._seed, width, int(component[:8], 16)])
        picks = rng.integers(0, len(samples), (size - 1, len(samples)))
        return numpy.concatenate([[numpy.median(samples)], numpy.median(samples[picks], axis=1)])

    def _usages(self, setup: Setup, prompts: Sequence[HasDigest]) -> list[Usage]:
        """What every prompt's rounds use: expected alone at batch 1, replayed as a full queue in a batch."""
        if self._workload.batch_size == 1:
            expected = [self._expected_rounds(setup, prompt) for prompt in prompts]
            return [self._cost_model.usage(setup, rounds.shapes, 0.0) for rounds in expected]
        key = (setup, tuple(prompt.digest for prompt in prompts))
        if key not in self._replays:
            self._replays[key] = self._replay(setup, prompts)
        return self._replays[key]

    def _replay(self, setup: Setup, prompts: Sequence[HasDigest]) -> list[Usage]:
        """The mean of each prompt's turns in a queue as long as those of real runs, with every prompt in it."""
        size = max(QUEUE_BATCHES * self._workload.batch_size, len(prompts))
        capabilities = self._evidence.capabilities
        rng = random.Random(f"{self._seed} {setup.digest}")
        queue = [
            draw_rounds(
                self._evidence.traces[prompt.digest],
                self._acceptance(setup, prompt),
                setup.length,
                NO_END if capabilities.past_end else self._workload.max_new_tokens,
                rng=rng,
            )
            for prompt in itertools.islice(itertools.cycle(prompts), size)
        ]
        runs = replay(queue, self._workload.batch_size, capabilities)
        usages = []
        for index in range(len(prompts)):
            turns = runs[index :: len(prompts)]
            shapes: Counter[StepShape] = Counter()
            for run in turns:
                shapes.update(run.shapes)
            mean = {shape: count / len(turns) for shape, count in shapes.items()}
            refills = sum(run.refills for run in turns) / len(turns)
            usages.append(self._cost_model.usage(setup, mean, refills))
        return usages

    def _acceptance(self, setup: Setup, prompt: HasDigest) -> DraftAcceptance | None:
        if setup.stop_below is not None and self._workload.batch_size > 1:
            raise NotMeasuredError(f"{setup.name}: rounds that stop below a confidence are not replayed in a batch")
        if not self._evidence.is_traced(setup.draft):
            raise NotMeasuredError(f"{setup.name}: its acceptance was not traced, it was only run")
        return None if setup.draft is None else self._evidence.acceptance(setup.draft, prompt)

    def _expected_rounds(self, setup: Setup, prompt: HasDigest) -> RoundCounts:
        key = (setup, prompt.digest)
        if key not in self._rounds:
            trace, acceptance = self._evidence.traces[prompt.digest], self._acceptance(setup, prompt)
            past_end = self._evidence.capabilities.past_end
            self._rounds[key] = expected_rounds(
                trace,
                acceptance,
                setup.length,
                self._workload.max_new_tokens,
                past_end=past_end,
                stop_below=setup.stop_below,
            )
        return self._rounds[key]

    def _overhead(self, draft: Draft | None) -> Overhead:
        if draft not in self._overheads:
            raise NotMeasuredError(f"draft {draft.name if draft else PLAIN.name} was not run at this load")
        return self._overheads[draft]

    def _calibrated(self) -> tuple[dict[Draft | None, Overhead], dict[Draft | None, Overhead]]:
        """Overheads by draft: from all calibration runs, and as arrays of these and then the resampled ones."""
        runs = [(setup, run) for setup, run in self._evidence.calibration if self._evidence.is_traced(setup.draft)]
        by_setup: dict[Setup, list[Sample]] = {}
        for setup, run in runs:
            by_setup.setdefault(setup, []).append(run)
        rng = numpy.random.default_rng(self._seed)
        variants = [runs]
        for _ in range(CALIBRATION_RESAMPLES):
            variants.append(
                [
                    (setup, same[pick])
                    for setup, same in by_setup.items()
                    for pick in rng.integers(0, len(same), len(same))
                ]
            )
        fitted = [self._cost_model.calibrate(self._steps, variant) for variant in variants]
        order = [0, *(1 + draw % CALIBRATION_RESAMPLES for draw in range(RESAMPLES))]
        drafts = [None, *filter(self._evidence.is_traced, self._evidence.drafts)]
        by_draft = {draft: [_overhead_of(draft, variant) for variant in fitted] for draft in drafts}
        return (
            {draft: overheads[0] for draft, overheads in by_draft.items()},
            {draft: Overhead(*numpy.array(overheads)[order].T) for draft, overheads in by_draft.items()},
        )


def _overhead_of(draft: Draft | None, fitted: Mapping[Draft | None, Overhead]) -> Overhead:
    """Of a composite without calibration runs its parts'; of another draft plain decoding's, in every round."""
    if draft in fitted:
        return fitted[draft]
    parts = [fitted[part] for part in draft.components if part in fitted] if draft else []
    if len(parts) > 1:
        return composed(*parts)
    plain = fitted.get(None, Overhead())
    return plain._replace(proposing_s=plain.idle_s)


def _percentiles(draws: numpy.ndarray) -> Interval:
    """The first draw is the estimate; the rest give the 2.5 and 97.5 % points."""
    estimate = float(draws[0])
    low, high = (float(value) for value in numpy.percentile(draws[1:], [2.5, 97.5]))
    return Interval(estimate=estimate, low=min(low, estimate), high=max(high, estimate))
