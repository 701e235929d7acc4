"""`TorchEngine`: the engine protocol on transformers' model classes, one sequence at a time.

Every method measures one unit: the caller decides what to measure, keeps it and may stop between units. Timed units
are repeated while other processes disturb the machine. Knows nothing of stores or searches.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from profiles import acceptance, latency, models
from profiles.clock import Clock, OtherLoad
from profiles.decoding import Generation, TargetStepper, generate
from profiles.drafting import DraftSource
from profiles.environment import fingerprint
from profiles.errors import EngineError, InputError, OutOfMemoryError
from profiles.sampling import keyed_draws
from profiles.terms import (
    PLAIN,
    Acceptance,
    Draft,
    Environment,
    Model,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
    digest_of,
)

Measurement = TypeVar("Measurement")

MAX_REPEATS = 2
NEAR_TIE = 1e-4  # greedy float32 outputs may part only where the two largest logits lie this close


class TorchEngine:
    """A target and its drafts on one device; fits `terms.Engine`."""

    def __init__(self, target: models.Loaded, sources: tuple[DraftSource, ...], device: str) -> None:
        self._target = target
        self._sources = {source.draft: source for source in sources}
        self._clock = Clock(device)
        self._device = device
        self._environment = fingerprint(device)
        self._warm: set[Setup] = set()
        gc.collect()
        gc.freeze()  # the loaded models are not walked again by a collection in the middle of a timed run

    @property
    def environment(self) -> Environment:
        return self._environment

    @property
    def target(self) -> Model:
        return self._target.record

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return tuple(self._sources)

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with the probability and the logit gap of every emitted token kept."""
        self._check(workload, prompt, 0)
        with _translated(self._device):
            run = self._generate(workload, prompt, PLAIN, watch=True)
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(run.token_ids),
            target_probs=tuple(run.target_probs),
            logit_gaps=tuple(run.logit_gaps),
            ended=run.ended,
        )

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """The draft over the trace: a teacher-forced pass, or a look-up at every position."""
        source = self._source(draft)
        with _translated(self._device):
            if source.model is None:
                return acceptance.trace_lookup(draft, prompt, trace, max_length)
            return acceptance.trace_model(source.model, draft, workload, prompt, trace)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """All staircases in one interleaved sweep, repeated while the machine is disturbed."""
        models.check_room(self._target, context_length=context_length, max_length=max_length)
        sources = tuple(self._sources.values())
        with _translated(self._device):
            part = (self.target.run_digest, self._target.model)
            shape = (context_length, max_length)
            times, disturbed = _quietest(lambda: latency.time_steps(part, sources, workload, shape, self._clock))
        return {digest: replace(staircase, disturbed=disturbed) for digest, staircase in times.items()}

    def run_together(
        self,
        workload: Workload,
        prompt: Prompt,
        setups: tuple[Setup, ...],
        occasion: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs back to back; all of them again while the machine is disturbed, at most twice."""
        for setup in setups:
            self._check(workload, prompt, setup.length)
        with _translated(self._device):
            for setup in setups:
                self._warm_up(workload, prompt, setup)
            runs, disturbed = _quietest(lambda: [self._generate(workload, prompt, setup) for setup in setups])
        if workload.temperature == 0.0:
            self._check_partings(workload, prompt, setups, runs)
        return tuple(self._sample(setup, prompt, run, disturbed) for setup, run in zip(setups, runs, strict=True))

    def _generate(self, workload: Workload, prompt: Prompt, setup: Setup, watch: bool = False) -> Generation:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
        draws = keyed_draws(workload, prompt)
        stepper = TargetStepper(self._target.model, workload, prompt, draws, watch=watch)
        drafter = None
        if setup.draft is not None:
            drafter = self._source(setup.draft).new_drafter(workload, draws, setup.stop_below)
        run = generate(stepper, drafter, setup.length, self._clock)
        if self._device.startswith("cuda"):
            run = replace(run, peak_memory_bytes=torch.cuda.max_memory_allocated(self._device))
        return run

    def _sample(self, setup: Setup, prompt: Prompt, run: Generation, disturbed: bool) -> Sample:
        return Sample(
            setup_digest=setup.digest,
            prompt_digest=prompt.digest,
            ttft_s=run.ttft_s,
            decode_s=run.decode_s,
            output_tokens=len(run.token_ids),
            rounds=dict(run.rounds),
            output_digest=digest_of(run.token_ids),
            peak_memory_bytes=run.peak_memory_bytes,
            disturbed=disturbed,
        )

    def _warm_up(self, workload: Workload, prompt: Prompt, setup: Setup) -> None:
        """The first runs of a setup pay for allocation and lazy set-up: one is thrown away."""
        if setup not in self._warm:
            self._generate(workload, prompt, setup)
            self._warm.add(setup)

    def _source(self, draft: Draft) -> DraftSource:
        if draft not in self._sources:
            known = ", ".join(known.name for known in self._sources) or "none"
            raise InputError(f"draft {draft.name} is not loaded; loaded are {known}")
        return self._sources[draft]

    def _check(self, workload: Workload, prompt: Prompt, length: int) -> None:
        if workload.batch_size != 1:
            raise InputError(
                f"batch size {workload.batch_size}: this engine decodes one sequence at a time, allowed is 1"
            )
        tokens = len(prompt.token_ids) + workload.max_new_tokens
        models.check_room(self._target, context_length=tokens, max_length=length)

    def _check_partings(
        self, workload: Workload, prompt: Prompt, setups: tuple[Setup, ...], runs: list[Generation]
    ) -> None:
        """Greedy outputs must equal the target's trace, but for near-ties; in 16-bit types a parting is only counted.

        Raises EngineError when float32 outputs part where the target was sure: decoding would not be lossless.
        """
        if self.target.dtype != "float32" or all(run.token_ids == runs[0].token_ids for run in runs):
            return
        trace = self.trace_target(workload, prompt)
        for setup, run in zip(setups, runs, strict=True):
            pairs = enumerate(zip(trace.token_ids, run.token_ids, strict=False))
            place = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
            if place is None:
                continue
            gap = trace.logit_gaps[place]
            if gap > NEAR_TIE:
                raise EngineError(
                    f"{setup.name} parted from plain decoding at token {place} of prompt {prompt.digest} where the "
                    f"two largest logits are {gap:.2g} apart; allowed are partings under {NEAR_TIE:g}"
                )


def _quietest(measure: Callable[[], Measurement]) -> tuple[Measurement, bool]:
    """The quietest of at most three tries, ended by the first undisturbed one, and whether it was disturbed."""
    tries: list[tuple[float, Measurement]] = []
    for _ in range(MAX_REPEATS + 1):
        with OtherLoad() as load:
            found = measure()
        if not load.disturbed:
            return found, False
        tries.append((load.cores or 0.0, found))
    return min(tries, key=lambda one: one[0])[1], True


@contextlib.contextmanager
def _translated(device: str) -> Iterator[None]:
    """Turns torch's out-of-memory error into ours; other errors are left alone."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"device {device} ran out of memory: {str(error).splitlines()[0][:200]}") from error
