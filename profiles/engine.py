"""`TorchEngine`: the engine protocol on transformers' model classes, one sequence at a time.

Every method measures one unit: the caller decides what to measure, keeps it and may stop between units. Timed units
are repeated while other processes disturb the machine. Knows nothing of stores or searches.
"""

import contextlib
import gc
from collections.abc import Iterator

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
            for _ in range(MAX_REPEATS + 1):
                with OtherLoad() as load:
                    times = latency.time_steps(
                        (self.target.run_digest, self._target.model),
                        sources,
                        workload,
                        (context_length, max_length),
                        self._clock,
                    )
                if not load.disturbed:
                    break
        return times

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
            for _ in range(MAX_REPEATS + 1):
                with OtherLoad() as load:
                    runs = [self._generate(workload, prompt, setup) for setup in setups]
                if not load.disturbed:
                    break
        if workload.temperature == 0.0:
            self._check_partings(workload, prompt, setups, runs)
        return tuple(self._sample(setup, prompt, run, load.disturbed) for setup, run in zip(setups, runs, strict=True))

    def _generate(self, workload: Workload, prompt: Prompt, setup: Setup, watch: bool = False) -> Generation:
        draws = keyed_draws(workload, prompt)
        stepper = TargetStepper(self._target.model, workload, prompt, draws, watch=watch)
        drafter = None
        if setup.draft is not None:
            drafter = self._source(setup.draft).new_drafter(workload, draws, setup.stop_below)
        return generate(stepper, drafter, setup.length, self._clock)

    def _sample(self, setup: Setup, prompt: Prompt, run: Generation, disturbed: bool) -> Sample:
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.startswith("cuda") else None
        return Sample(
            setup_digest=setup.digest,
            prompt_digest=prompt.digest,
            ttft_s=run.ttft_s,
            decode_s=run.decode_s,
            output_tokens=len(run.token_ids),
            rounds=dict(run.rounds),
            output_digest=digest_of(run.token_ids),
            peak_memory_bytes=peak,
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
        """Greedy outputs must be equal, but for near-ties; in 16-bit types a parting is only counted.

        Raises EngineError when float32 outputs part where the target was sure: decoding would not be lossless.
        """
        first = runs[0].token_ids
        for setup, run in zip(setups, runs, strict=True):
            if run.token_ids == first or self.target.dtype != "float32":
                continue
            place = next(i for i, (a, b) in enumerate(zip(first, run.token_ids, strict=False)) if a != b)
            gap = self.trace_target(workload, prompt).logit_gaps[place]
            if gap > NEAR_TIE:
                raise EngineError(
                    f"{setup.name} parted from {setups[0].name} at token {place} of prompt {prompt.digest} where the "
                    f"two largest logits are {gap:.2g} apart; allowed are partings under {NEAR_TIE:g}"
                )


@contextlib.contextmanager
def _translated(device: str) -> Iterator[None]:
    """Turns torch's out-of-memory error into ours; other errors are left alone."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"device {device} ran out of memory: {str(error).splitlines()[0][:200]}") from error
