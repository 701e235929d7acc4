"""`TorchEngine`: the engine protocol on transformers' model classes, a batch of rows at a time.

Every method measures one unit: the caller decides what to measure, keeps it and may stop between units. Timed units
are repeated while other processes disturb the machine. Knows nothing of stores or searches.
"""

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from profiles.acceptance import ngram
from profiles.engines.base import TORCH, EngineCapabilities, RoundController
from profiles.engines.lossless import check_queues
from profiles.engines.torch import step_times
from profiles.engines.torch import trace as acceptance
from profiles.engines.torch.adaptive import Drafters, Steered, SteeredRun, warm_up
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.decoder import Decoder, Generation
from profiles.engines.torch.drafters import DraftSource, ModelDrafter, NgramDrafter, PartDrafter
from profiles.engines.torch.sampling import KeyedRandom
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.models.footprint import SPARE_SLOTS
from profiles.records.core import PLAIN, Draft, Environment, Model, Prompt, Setup, Workload, digest_of
from profiles.records.draft_spec import MAX_BATCH, MAX_LENGTH
from profiles.records.errors import BadNumbersError, InputError, OutOfMemoryError
from profiles.records.evidence import Acceptance, Sample, StepTimes, TargetTrace
from profiles.timing.clock import Clock, quietest


class TorchEngine:
    """A target and its drafts on one device; fits `protocol.Engine`."""

    def __init__(self, target: loader.LoadedModel, sources: tuple[DraftSource, ...], device: str) -> None:
        self._target = target
        self._drafts = tuple(source.draft for source in sources)
        self._models: dict[str, PreTrainedModel | None] = {
            part.digest: source.model if part.kind != "ngram" else None
            for source in sources
            for part in source.draft.components
        }
        self._models[target.record.run_digest] = target.model
        self._clock = Clock(device)
        self._device = device
        self._gpus = sorted({str(one.device) for one in target.model.parameters() if one.device.type == "cuda"})
        self._environment = fingerprint(device)
        self._warm: set[tuple[Setup | tuple[int, int], int]] = set()  # (setup, or steered runs' shape; batch size)
        self._rows: dict[int, dict[str, RowModel]] = {}  # by batch size, then by part: caches are kept between runs
        self._capacity = 0
        gc.collect()
        gc.freeze()  # the loaded models are not walked again by a collection in the middle of a timed run

    @property
    def capabilities(self) -> EngineCapabilities:
        return TORCH

    @property
    def environment(self) -> Environment:
        return self._environment

    @property
    def target(self) -> Model:
        return self._target.record

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return self._drafts

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with the probability and the logit gap of every emitted token kept."""
        self._check(workload, (prompt,), 0)
        with _translated(self._device):
            [run] = self._generate(replace(workload, batch_size=1), (prompt,), PLAIN, watch=True)
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
        """A draft's part over the trace: a teacher-forced pass, or a look-up at every position."""
        model = self._model(draft)
        with _translated(self._device):
            if model is None:
                return ngram.trace_lookup(draft, prompt, trace, max_length)
            return acceptance.trace_model(model, draft, workload, prompt, trace)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """All staircases in one interleaved sweep, repeated while the machine is disturbed."""
        loader.check_context(self._target, context_length=context_length, max_length=max_length)
        with _translated(self._device):
            parts = step_times.Parts(
                target=(self.target.run_digest, self._stepper(self.target.run_digest, workload)),
                models={digest: self._stepper(digest, workload) for digest in self._model_parts},
                lookups={
                    part.digest: part for draft in self._drafts for part in draft.components if part.kind == "ngram"
                },
            )
            shape = (context_length, max_length)
            times, disturbed = quietest(lambda: step_times.time_steps(parts, workload, shape, self._clock), self._gpus)
        return {digest: replace(staircase, disturbed=disturbed) for digest, staircase in times.items()}

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs back to back; all of them again while the machine is disturbed, at most twice."""
        for setup in setups:
            self._check(workload, prompts, setup.length)
        with _translated(self._device):
            for setup in setups:
                self._warm_up(workload, prompts, setup)
            runs, disturbed = quietest(
                lambda: [self._generate(workload, prompts, setup) for setup in setups], self._gpus
            )
        outputs = [(setup, [run.token_ids for run in own]) for setup, own in zip(setups, runs, strict=True)]
        check_queues(self.target, workload, prompts, outputs, self.trace_target)
        return tuple(
            _sample(setup, prompt, run, disturbed)
            for setup, own in zip(setups, runs, strict=True)
            for prompt, run in zip(prompts, own, strict=True)
        )

    def run_steered(
        self, workload: Workload, prompts: tuple[Prompt, ...], controller: RoundController, max_length: int
    ) -> SteeredRun:
        """A queue of prompts decoded as `controller` says, with any loaded draft and up to `max_length` tokens a round.

        Run once: a pilot learns from what it hears. Raises InputError: a pick of a draft that is not loaded, or of a
        longer length.
        """
        self._check(workload, prompts, max_length)
        draws = KeyedRandom(workload.batch_size, workload, self._target.model.device)
        drafters = Drafters(functools.partial(self._part, draws), max_length)
        with _translated(self._device):
            target = self._stepper(self.target.run_digest, workload)
            drafts = [self._stepper(digest, workload) for digest in self._model_parts]
            shape = workload.context_length, max_length
            if (shape, workload.batch_size) not in self._warm:
                warm_up(target, drafts, (workload.context_length, max_length))
                self._warm.add((shape, workload.batch_size))
            decoder = Decoder(target, drafters, draws, length=max_length)
            with self._watched() as runs:
                found = Steered(decoder, drafters, workload, controller).run(prompts, self._clock)
                runs.extend(found.generations)
        return found

    def _generate(
        self, workload: Workload, prompts: Sequence[Prompt], setup: Setup, watch: bool = False
    ) -> list[Generation]:
        draws = KeyedRandom(workload.batch_size, workload, self._target.model.device)
        drafter = Drafters(functools.partial(self._part, draws), setup.length).use(setup)
        target = self._stepper(self.target.run_digest, workload)
        decoder = Decoder(target, drafter, draws, length=setup.length, watch=watch)
        with self._watched() as runs:
            runs.extend(decoder.run(prompts, self._clock))
        return runs

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Generation]]:
        """Notes the peak memory in the runs that the block puts into the list; caches that went bad are let go."""
        on_gpu = self._device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        runs: list[Generation] = []
        try:
            yield runs
        except BadNumbersError:
            # a value that is not finite would spoil what is decoded over it, masked or not
            self._drop_rows(tuple(self._rows))
            raise
        if on_gpu:
            for run in runs:
                run.peak_memory_bytes = torch.cuda.max_memory_allocated(self._device)

    @property
    def _model_parts(self) -> list[str]:
        """Digests of the drafts' parts that are models."""
        return [
            digest for digest, model in self._models.items() if model is not None and digest != self.target.run_digest
        ]

    def _part(self, draws: KeyedRandom, part: Draft) -> PartDrafter:
        if self._model(part) is not None:
            return ModelDrafter(self._stepper(part.digest, draws.workload), draws)
        assert part.max_match is not None
        assert part.min_match is not None
        return NgramDrafter(draws.workload.batch_size, part.max_match, part.min_match)

    def _stepper(self, part: str, workload: Workload) -> RowModel:
        """A part's model with a cache for this workload; caches of another batch size go when a new one is made."""
        if self._capacity < workload.context_length + SPARE_SLOTS:
            self._drop_rows(tuple(self._rows))
            self._capacity = workload.context_length + SPARE_SLOTS
        size = workload.batch_size
        if size not in self._rows:
            if size > 1:  # batch 1 is kept and drops nothing: traces are made there
                self._drop_rows([other for other in self._rows if other > 1])
            self._rows[size] = {}
        if part not in self._rows[size]:
            model = self._models[part]
            assert model is not None
            self._rows[size][part] = RowModel(model, size, self._capacity)
        return self._rows[size][part]

    def _drop_rows(self, sizes: Sequence[int]) -> None:
        """Lets the caches of these batch sizes go; their next run of a setup will not be timed."""
        self._rows = {size: rows for size, rows in self._rows.items() if size not in sizes}
        self._warm = {(setup, size) for setup, size in self._warm if size not in sizes}

    def _warm_up(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """The first runs of a setup pay for allocation and lazy set-up: one is thrown away."""
        if (setup, workload.batch_size) not in self._warm:
            self._generate(workload, prompts[: workload.batch_size], setup)
            self._warm.add((setup, workload.batch_size))

    def _model(self, draft: Draft) -> PreTrainedModel | None:
        if draft.digest not in self._models:
            known = ", ".join(known.name for known in self._drafts) or "none"
            raise InputError(f"draft {draft.name} is not loaded; loaded are {known}")
        return self._models[draft.digest]

    def _check(self, workload: Workload, prompts: Sequence[Prompt], length: int) -> None:
        if workload.batch_size > MAX_BATCH:
            raise InputError(f"batch size {workload.batch_size}: this engine decodes up to {MAX_BATCH} rows at a time")
        if not 0 <= length <= MAX_LENGTH:
            raise InputError(f"speculation length {length}: this engine drafts up to {MAX_LENGTH} tokens a round")
        tokens = max(len(prompt.token_ids) for prompt in prompts) + workload.max_new_tokens
        loader.check_context(self._target, context_length=tokens, max_length=length)
        loader.check_prompts(workload, prompts)


def _sample(setup: Setup, prompt: Prompt, run: Generation, disturbed: bool) -> Sample:
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=run.ttft_s,
        decode_s=run.decode_s,
        output_tokens=len(run.token_ids),
        rounds=dict(run.rounds),
        shapes=dict(run.shapes),
        refills=run.refills,
        output_digest=digest_of(run.token_ids),
        peak_memory_bytes=run.peak_memory_bytes,
        disturbed=disturbed,
    )


@contextlib.contextmanager
def _translated(device: str) -> Iterator[None]:
    """Turns torch's out-of-memory error into ours; other errors are left alone."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"device {device} ran out of memory: {str(error).splitlines()[0][:200]}") from error
