"""`TorchEngine`: the engine protocol on transformers' model classes, a batch of rows at a time.

Every method measures one unit. Timed units are repeated while other processes disturb the machine.
"""

import contextlib
import functools
import gc
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from profiles.acceptance import ngram
from profiles.engines.base import TORCH, RoundController
from profiles.engines.runs import DecodedQueue, samples_of
from profiles.engines.torch import step_times
from profiles.engines.torch.adaptive import AdaptiveLoop, AdaptiveRun, SwitchableDrafter, warm_up
from profiles.engines.torch.attention import kernel_name
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.decoder import Decoder, Generation
from profiles.engines.torch.drafters import ComponentDrafter, ModelDrafter, NgramDrafter
from profiles.engines.torch.sampling import KeyedRandom
from profiles.engines.torch.trace import trace_model
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.models.footprint import SPARE_SLOTS, cache_slots
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.draft_spec import MAX_BATCH, MAX_LENGTH
from profiles.records.errors import BadNumbersError, InputError, OutOfMemoryError
from profiles.records.evidence import Acceptance, Sample, StepTimes, TargetTrace
from profiles.timing.clock import Clock, cores_used, quietest

WARM_UP_TOKENS = 4  # beside the longest round


class TorchEngine:
    """A target and its drafts, with their models where they have one, on one device; fits `base.Engine`."""

    capabilities = TORCH

    def __init__(self, target: loader.LoadedModel, drafts: Mapping[Draft, PreTrainedModel | None], device: str) -> None:
        self._target, self.target = target, target.record
        self.drafts = tuple(drafts)
        self._models: dict[str, PreTrainedModel | None] = {
            component.digest: model if component.kind != "ngram" else None
            for draft, model in drafts.items()
            for component in draft.components
        }
        self._models[target.record.run_digest] = target.model
        self._device = device
        self._gpus = (device,) if device.startswith("cuda") else ()
        self._clock = Clock(device)
        self.environment = fingerprint(device)
        if self._gpus:
            self.environment = replace(
                self.environment, engine_options=json.dumps({"attention": kernel_name(target.model)})
            )
        self._warm: set[tuple[object, int, int]] = set()  # a setup or an adaptive run's length; batch size; context
        self._rows: dict[int, dict[str, RowModel]] = {}  # by batch size and component: caches are kept between runs
        self._capacity = 0
        gc.collect()
        gc.freeze()  # the loaded models are not walked again by a collection in the middle of a timed run

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run that keeps the probability and the logit gap of every emitted token."""
        self._check(workload, (prompt,), 0)
        with self._guarded():
            [run] = self._generate(replace(workload, batch_size=1), (prompt,), PLAIN, watch=True)
        return run.target_trace(prompt)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """A draft's component over the trace: a teacher-forced pass, or a look-up at every position."""
        model = self._model(draft)
        with self._guarded():
            if model is None:
                return ngram.trace_lookup(draft, prompt, trace, max_length)
            return trace_model(model, draft, workload, prompt, trace)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """All components in one interleaved sweep, repeated while the machine is disturbed."""
        loader.check_context(self._target, context_length=context_length, max_length=max_length)
        with self._guarded():
            drafts = {component.digest: component for draft in self.drafts for component in draft.components}
            timed = {
                digest: drafts[digest] if model is None else self._row_model(digest, workload)
                for digest, model in self._models.items()
            }
            times, disturbed = quietest(
                lambda: step_times.time_steps(
                    timed,
                    self._clock,
                    workload,
                    target=self.target.run_digest,
                    context_length=context_length,
                    max_length=max_length,
                ),
                self._gpus,
            )
        return {digest: replace(component, disturbed=disturbed) for digest, component in times.items()}

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,
    ) -> tuple[Sample, ...]:
        """Timed runs back to back; all of them again while the machine is disturbed, at most twice."""
        for setup in setups:
            self._check(workload, prompts, setup.length)
        with self._guarded():
            for setup in setups:
                self._warm_up(workload, prompts, setup)
            decode = [functools.partial(self._generate, workload, prompts, setup) for setup in setups]
            decoded, disturbed = quietest(lambda: [cores_used(run, time.process_time) for run in decode], self._gpus)
        queues = [DecodedQueue(setup, *runs, disturbed) for setup, runs in zip(setups, decoded, strict=True)]
        return samples_of(self.target, workload, prompts, queues, trace_target=self.trace_target)

    def run_adaptive(
        self, workload: Workload, prompts: tuple[Prompt, ...], controller: RoundController, max_length: int
    ) -> AdaptiveRun:
        """A queue of prompts decoded as `controller` decides, with any loaded draft and up to `max_length` tokens.

        Never repeated: a controller learns from what it observes. Raises InputError: a decision for a draft that is
        not loaded, or for a longer length.
        """
        self._check(workload, prompts, max_length)
        rng = KeyedRandom(workload.batch_size, workload, self._target.model.device)
        drafter = SwitchableDrafter(functools.partial(self._component_drafter, rng), max_length)
        with self._guarded():
            target = self._row_model(self.target.run_digest, workload)
            warm = max_length, workload.batch_size, workload.context_length
            if warm not in self._warm:
                self._run_all_steps(self._models, workload, max_length)
                self._warm.add(warm)
            decoder = Decoder(target, drafter, rng, length=max_length)
            return AdaptiveLoop(decoder, drafter, controller).run(prompts, self._clock)

    def _generate(
        self, workload: Workload, prompts: Sequence[Prompt], setup: Setup, *, watch: bool = False
    ) -> list[Generation]:
        rng = KeyedRandom(workload.batch_size, workload, self._target.model.device)
        drafter = SwitchableDrafter(functools.partial(self._component_drafter, rng), setup.length).use(setup)
        target = self._row_model(self.target.run_digest, workload)
        decoder = Decoder(target, drafter, rng, length=setup.length, watch=watch)
        runs = decoder.run(prompts, self._clock)
        for run in runs:
            run.threads = torch.get_num_threads()
        return runs

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns torch's out-of-memory error into ours, and drops the caches when logits are not finite.

        A value that is not finite would spoil what is decoded over it, masked or not.
        """
        try:
            yield
        except BadNumbersError:
            self._drop_rows(tuple(self._rows))
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error).splitlines()[0][:200]
            raise OutOfMemoryError(f"device {self._device} ran out of memory: {reason}") from error

    def _component_drafter(self, rng: KeyedRandom, component: Draft) -> ComponentDrafter:
        if self._model(component) is not None:
            return ModelDrafter(self._row_model(component.digest, rng.workload), rng)
        assert component.max_match is not None
        assert component.min_match is not None
        return NgramDrafter(rng.workload.batch_size, component.max_match, component.min_match)

    def _row_model(self, digest: str, workload: Workload) -> RowModel:
        """A component's model with a cache for this workload; caches of another batch size go when one is made."""
        if self._capacity < workload.context_length + SPARE_SLOTS:
            self._drop_rows(tuple(self._rows))
            self._capacity = workload.context_length + SPARE_SLOTS
        size = workload.batch_size
        if size not in self._rows:
            if size > 1:  # batch 1 is kept and drops nothing: traces are made there
                self._drop_rows([other for other in self._rows if other > 1])
            self._rows[size] = {}
        if digest not in self._rows[size]:
            model = self._models[digest]
            assert model is not None
            self._rows[size][digest] = RowModel(model, size, self._capacity)
        rows = self._rows[size][digest]
        rows.context_slots = cache_slots(workload.context_length)
        return rows

    def _drop_rows(self, sizes: Sequence[int]) -> None:
        """Frees the caches of these batch sizes; their next run of a setup will not be timed."""
        self._rows = {size: rows for size, rows in self._rows.items() if size not in sizes}
        self._warm = {warm for warm in self._warm if warm[1] not in sizes}

    def _warm_up(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """A setup's first run pays for allocation and lazy set-up, on a GPU for captures: a short one goes before."""
        # what is captured on a GPU depends on the context too
        warm = setup, workload.batch_size, workload.context_length if self._gpus else 0
        if warm not in self._warm:
            if self._gpus:
                components = () if setup.draft is None else setup.draft.components
                self._run_all_steps([component.digest for component in components], workload, setup.length)
            short = replace(workload, max_new_tokens=min(workload.max_new_tokens, setup.length + WARM_UP_TOKENS))
            self._generate(short, prompts[: workload.batch_size], setup)
            self._warm.add(warm)

    def _run_all_steps(self, components: Iterable[str], workload: Workload, max_length: int) -> None:
        """Runs every step that rounds of these components can take, so that none is new in a timed round."""
        target = self._row_model(self.target.run_digest, workload)
        drafts = [
            self._row_model(digest, workload)
            for digest in components
            if digest != self.target.run_digest and self._models[digest] is not None
        ]
        warm_up(target, drafts, context_length=workload.context_length, max_length=max_length)

    def _model(self, draft: Draft) -> PreTrainedModel | None:
        if draft.digest not in self._models:
            loaded = ", ".join(loaded.name for loaded in self.drafts) or "none"
            raise InputError(f"draft {draft.name} is not loaded; loaded are {loaded}")
        return self._models[draft.digest]

    def _check(self, workload: Workload, prompts: Sequence[Prompt], length: int) -> None:
        if workload.batch_size > MAX_BATCH:
            raise InputError(f"batch size {workload.batch_size}: this engine decodes up to {MAX_BATCH} rows at a time")
        if not 0 <= length <= MAX_LENGTH:
            raise InputError(f"speculation length {length}: this engine drafts up to {MAX_LENGTH} tokens a round")
        tokens = max(len(prompt.token_ids) for prompt in prompts) + workload.max_new_tokens
        loader.check_context(self._target, context_length=tokens, max_length=length)
        loader.check_prompts(workload, prompts)
