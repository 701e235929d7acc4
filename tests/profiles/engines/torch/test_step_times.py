"""The sweep of step times ends, says how far it is, and holds what sampling costs; in seconds that are made up."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from profiles.acceptance import ngram
from profiles.engines.base import TORCH
from profiles.engines.runs import DecodedQueue, samples_of
from profiles.engines.torch import decoder, drafters, step_times
from profiles.engines.torch.decoder import Decoder
from profiles.engines.torch.drafters import NgramDrafter
from profiles.engines.torch.sampling import KeyedRandom, sampling_probs
from profiles.engines.torch.step_times import CYCLES, MIN_CYCLES, time_steps
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.evidence import Acceptance, Sample, StepTimes, TargetTrace
from profiles.stats import median
from profiles.timing.clock import Clock
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET
from tests.support.toys import VOCABULARY, TableModel, TableRows, near
from tuner.forecast.evidence import gather
from tuner.forecast.forecaster import Forecaster

STEP_S, SAMPLING_S = 0.005, 0.0005  # a step at any width, and the distribution of one position
WORKLOAD = Workload(context_length=96, max_new_tokens=48, temperature=0.8)
MODEL = TableModel(seed=1)
PROMPTS = tuple(
    Prompt(
        domain="toy", token_ids=tuple(torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(n)).tolist())
    )
    for n in range(60)
)


@pytest.mark.parametrize(
    ("reading_s", "least", "most"), [(0.1, CYCLES, CYCLES), (1.0, 10, 20), (20.0, MIN_CYCLES, MIN_CYCLES)]
)
def test_a_long_sweep_has_fewer_cycles(
    reading_s: float, least: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a busy program it took 14 minutes instead of 80 s, without a line; two minutes are enough for medians."""
    readings = itertools.count()
    clock = Clock("cpu", now=lambda: reading_s * next(readings))
    with caplog.at_level(logging.INFO, logger="profiles"):
        times = time_steps(
            {"t": TableModel(seed=1, vocabulary=100).rows(1)}, clock, GREEDY, target="t", context_length=8, max_length=2
        )
    assert all(least <= len(samples) <= most for samples in times["t"].samples_s.values())
    lines = [record.getMessage() for record in caplog.records]
    assert bool(lines) == (reading_s > 0.1)
    assert all(line.startswith("step times: cycle ") and line.endswith(" s left") for line in lines)


class ToyEngine:
    """Fits `Engine`: the torch engine's own loop and step times over a table, with look-ups, in made-up seconds."""

    capabilities, environment, target = TORCH, MACHINE, TARGET
    drafts: tuple[Draft, ...] = (NGRAM,)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.clock = Clock("cpu", now=self._now)
        step: Callable[..., torch.Tensor] = TableRows.step

        def slow_step(rows: TableRows, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            self.seconds += STEP_S
            return step(rows, tokens % VOCABULARY, *rest, **options)

        def slow_sampling(logits: torch.Tensor, workload: Workload) -> torch.Tensor:
            self.seconds += SAMPLING_S * (logits.numel() // logits.shape[-1])
            return sampling_probs(logits, workload)

        monkeypatch.setattr(TableRows, "step", slow_step)
        for module in (decoder, drafters, step_times):
            monkeypatch.setattr(module, "sampling_probs", slow_sampling)

    def _now(self) -> float:
        self.seconds += 1e-9  # a look-up takes time too
        return self.seconds

    def decode(self, workload: Workload, prompt: Prompt, setup: Setup, *, watch: bool = False) -> decoder.Generation:
        rng = KeyedRandom(1, workload, torch.device("cpu"))
        drafter = NgramDrafter(1, 4, 2) if setup.draft else None
        loop = Decoder(MODEL.rows(1), drafter, rng, length=setup.length, watch=watch)
        return loop.run([prompt], self.clock)[0]

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        return self.decode(workload, prompt, Setup(), watch=True).target_trace(prompt)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        return ngram.trace_lookup(draft, prompt, trace, max_length)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        return time_steps(
            {TARGET.run_digest: MODEL.rows(1), NGRAM.digest: NGRAM},
            self.clock,
            workload,
            target=TARGET.run_digest,
            context_length=context_length,
            max_length=max_length,
        )

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        queues = [
            DecodedQueue(setup, [self.decode(workload, prompt, setup) for prompt in prompts], 1.0, False)
            for setup in setups
        ]
        return samples_of(TARGET, workload, prompts, queues, trace_target=self.trace_target)


def test_forecasts_of_sampled_look_ups_do_not_drift_with_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verified position is sampled, which no constant per round stands for."""
    engine = ToyEngine(monkeypatch)
    evidence = gather(engine, WORKLOAD, PROMPTS, range(1, 9))
    forecaster = Forecaster(evidence, WORKLOAD, TARGET.run_digest)
    errors = []
    for length in range(1, 9):
        setup = Setup(draft=NGRAM, length=length)
        runs = engine.run_together(WORKLOAD, PROMPTS, (setup,), "test")
        measured = sum(run.output_tokens - 1 for run in runs) / sum(run.decode_s for run in runs)
        errors.append(forecaster.forecast(setup, PROMPTS).tok_per_s.estimate / measured - 1.0)
    assert max(map(abs, errors)) < 0.03, errors
    assert abs(errors[-1] - errors[0]) < 0.02, errors


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_cost_what_a_round_of_the_workload_does(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target samples every verified position, a draft one token a step; greedy steps cost no sampling."""
    engine = ToyEngine(monkeypatch)
    times = time_steps(
        {TARGET.run_digest: MODEL.rows(2), DRAFT_A.digest: near(MODEL, 2, 1.0).rows(2)},
        engine.clock,
        replace(WORKLOAD, temperature=temperature, batch_size=2),
        target=TARGET.run_digest,
        context_length=32,
        max_length=3,
    )
    position_s = 2 * SAMPLING_S if temperature else 0.0
    for width in range(1, 5):
        step_s = median(times[TARGET.run_digest].samples_s[width])
        assert step_s == pytest.approx(STEP_S + width * position_s)
    for samples in times[DRAFT_A.digest].samples_s.values():
        assert median(samples) == pytest.approx(STEP_S + position_s)


def test_steps_are_timed_in_the_order_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose weights the cache has lost to another model takes longer; single tokens were 20 to 40 % off."""
    seconds, last = [0.0], [0]
    step: Callable[..., torch.Tensor] = TableRows.step

    def cached_step(rows: TableRows, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seconds[0] += STEP_S + (SAMPLING_S if last[0] != id(rows) else 0.0)
        last[0] = id(rows)
        return step(rows, tokens % VOCABULARY, *rest, **options)

    monkeypatch.setattr(TableRows, "step", cached_step)
    models = {"t": MODEL.rows(1), "a": near(MODEL, 2, 1.0).rows(1), "b": near(MODEL, 3, 1.0).rows(1)}
    clock = Clock("cpu", now=lambda: seconds[0])
    times = time_steps(models, clock, GREEDY, target="t", context_length=8, max_length=4)
    evicted = {("t", 1): 0.0, ("a", 1): 0.0, ("b", 1): 0.0, ("a", 2): 1.0, ("b", 2): 1.0}
    evicted |= {("t", width): 1.0 for width in (2, 3, 4, 5)}
    for (component, width), misses in evicted.items():
        assert median(times[component].samples_s[width]) == pytest.approx(STEP_S + misses * SAMPLING_S), (
            component,
            width,
        )
