"""Collects from an engine what forecasts need: target traces, draft acceptance, step times and calibration runs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from profiles.acceptance.expected_rounds import DraftAcceptance, combine
from profiles.engines.base import TORCH, Engine, EngineCapabilities
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError, NotMeasuredError
from profiles.records.evidence import Acceptance, Infeasible, Sample, StepTimes, TargetTrace
from profiles.stats import median
from tuner.forecast.cost_model import cost_model_of
from tuner.forecast.queues import purpose_of, queues

CALIBRATION_QUEUES, CALIBRATION_BATCHES = 2, 2  # in a batch: how many queues, and their length in batches
MIN_PROMPTS = 2  # for an interval over prompts
CONTEXT_STEP = 32  # cached tokens are rounded up to this many, so that similar prompt sets share step times

Progress = Callable[[str, int, int], None]  # stage, units done, units in all


class HasDigest(Protocol):
    """A prompt, as far as evidence is looked up by it."""

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the forecasts of one workload are computed from.

    `traces` is keyed by prompt digest, `acceptances` by (component digest, prompt digest), `steps` by component digest.
    A draft that the engine does not trace was run at every length and appears in `calibration` only.
    """

    prompts: tuple[Prompt, ...]
    traces: dict[str, TargetTrace]
    acceptances: dict[tuple[str, str], Acceptance]
    steps: dict[str, StepTimes]
    calibration: tuple[tuple[Setup, Sample], ...]
    drafts: tuple[Draft, ...]
    infeasible: tuple[Infeasible, ...]
    capabilities: EngineCapabilities = TORCH

    @property
    def components(self) -> tuple[Draft, ...]:
        """What was traced and timed: the drafts, of composites their components, each once."""
        traced = self.capabilities.timed(self.drafts)
        return tuple({part.digest: part for draft in traced for part in draft.components}.values())

    def is_traced(self, draft: Draft | None) -> bool:
        """Whether the engine traces this draft; plain decoding (None) counts as traced."""
        return draft is None or self.capabilities.traces(draft)

    def can_forecast(self, setup: Setup) -> bool:
        """Whether a forecast can be made: a draft that was only run needs two prompts timed at this length."""
        if setup.draft is None:
            return True
        enough_runs = len(self.timed_prompts(setup) & self.timed_prompts(PLAIN)) >= MIN_PROMPTS
        return self.capabilities.drafts_with(setup) and (self.is_traced(setup.draft) or enough_runs)

    def timed_prompts(self, setup: Setup) -> set[str]:
        """Digests of the prompts whose calibration run with this setup has a time per token."""
        return {run.prompt_digest for other, run in self.calibration if other == setup and run.output_tokens > 1}

    def acceptance(self, draft: Draft, prompt: HasDigest) -> DraftAcceptance:
        """How a draft did on a prompt's trace. Raises NotMeasuredError when a component was not measured."""
        acceptances = [self.acceptances.get((part.digest, prompt.digest)) for part in draft.components]
        if None in acceptances:
            raise NotMeasuredError(f"the acceptance of {draft.name} on prompt {prompt.digest} was not measured")
        return combine([acceptance for acceptance in acceptances if acceptance is not None])


def calibration_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The one or two lengths whose real runs calibrate the overhead; forecasts are not graded on them."""
    ordered = sorted(set(lengths))
    return tuple(dict.fromkeys((ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])))


def typical_context(workload: Workload, prompts: Sequence[Prompt]) -> int:
    """Tokens in the cache halfway through a typical run, rounded up to a multiple of 32 within the context."""
    tokens = median(len(prompt.token_ids) for prompt in prompts) + workload.max_new_tokens / 2
    return min(int(-(-tokens // CONTEXT_STEP)) * CONTEXT_STEP, workload.context_length)


def gather(
    engine: Engine,
    workload: Workload,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    *,
    progress: Progress = lambda *_: None,
) -> Evidence:
    """Measures or recalls all evidence for one workload.

    Each call to the engine is one unit, so a caching engine makes this resumable. A draft that fails is listed in
    `Evidence.infeasible` and the others go on.

    Raises:
        InputError: there are no prompts.
        EngineError: the target itself, or plain decoding, fails.
    """
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    return _Collector(engine, workload, prompts, progress).collect(lengths)


def trace_more(
    engine: Engine,
    workload: Workload,
    evidence: Evidence,
    prompts: Sequence[Prompt],
    *,
    setup: Setup,
    max_length: int,
    progress: Progress = lambda *_: None,
) -> Evidence:
    """The evidence with traces of further prompts, and with the acceptance there of the setup's draft alone.

    Raises EngineError as the engine does.
    """
    traces, acceptances = dict(evidence.traces), dict(evidence.acceptances)
    components = setup.draft.components if setup.draft is not None else ()
    for number, prompt in enumerate(prompts):
        progress(f"trace for the proof of {setup.name}", number, len(prompts))
        trace = traces[prompt.digest] = engine.trace_target(workload, prompt)
        for part in components:
            acceptance = engine.trace_draft(workload, prompt, trace, part, max_length)
            acceptances[part.digest, prompt.digest] = acceptance
    return replace(evidence, traces=traces, acceptances=acceptances)


def _digests(draft: Draft) -> set[str]:
    return {component.digest for component in draft.components}


class _Collector:
    """The evidence collected so far, and the drafts that failed."""

    def __init__(self, engine: Engine, workload: Workload, prompts: Sequence[Prompt], progress: Progress) -> None:
        self._engine = engine
        self._workload = workload
        self._prompts = prompts
        self._progress = progress
        self._cost_model = cost_model_of(engine.capabilities, engine.target.run_digest)
        self._queues = queues(
            prompts,
            workload.batch_size,
            max_alone=self._cost_model.calibration_prompts,
            num_queues=CALIBRATION_QUEUES,
            batches_per_queue=CALIBRATION_BATCHES,
        )
        self._traces: dict[str, TargetTrace] = {}
        self._acceptances: dict[tuple[str, str], Acceptance] = {}
        self._runs: list[tuple[Setup, Sample]] = []
        self._infeasible: list[Infeasible] = []

    def collect(self, lengths: Sequence[int]) -> Evidence:
        for number, prompt in enumerate(self._prompts):
            self._progress("target trace", number, len(self._prompts))
            self._traces[prompt.digest] = self._engine.trace_target(self._workload, prompt)
        drafts = self._trace_drafts(max(lengths))
        num_untraceable = len(self._infeasible)
        self._progress("step times", 0, 1)
        context = typical_context(self._workload, self._prompts)
        steps = self._engine.time_steps(self._workload, context, max(lengths))
        capabilities = self._engine.capabilities
        untimed = [draft for draft in capabilities.timed(drafts) if not steps.keys() >= _digests(draft)]
        for draft in untimed:
            if self._try(0, (PLAIN, Setup(draft=draft, length=max(lengths)))):  # running it gives the reason
                self._leave_out(Setup(draft=draft, length=max(lengths)), EngineError("its steps could not be timed"))
        drafts = [draft for draft in drafts if draft not in untimed]
        composed = self._composed(capabilities.timed(drafts))
        self._run_traced([draft for draft in capabilities.timed(drafts) if draft not in composed], lengths)
        self._run_untraced([draft for draft in drafts if not capabilities.traces(draft)], lengths)
        failed = {infeasible.setup for infeasible in self._infeasible[num_untraceable:]}
        failed_drafts = {setup.draft for setup in failed}
        return Evidence(
            prompts=tuple(self._prompts),
            traces=self._traces,
            acceptances=self._acceptances,
            steps=steps,
            calibration=tuple((setup, run) for setup, run in self._runs if setup not in failed),
            drafts=tuple(
                draft
                for draft in drafts
                if not capabilities.traces(draft)
                or failed_drafts.isdisjoint(draft.components if draft in composed else {draft})
            ),
            infeasible=tuple(self._infeasible),
            capabilities=capabilities,
        )

    def _trace_drafts(self, max_length: int) -> list[Draft]:
        """The drafts to go on with: traced without an error, or of a kind that the engine does not trace."""
        capabilities = self._engine.capabilities
        usable: list[Draft] = []
        failed: set[str] = set()
        for number, draft in enumerate(self._engine.drafts):
            longest = Setup(draft=draft, length=max_length)
            if failed.intersection(part.digest for part in draft.components):
                continue  # a composite whose component is listed as infeasible already
            if not capabilities.drafts_with(longest):
                reason = f"{capabilities.name} drafts nothing with it at lengths up to {max_length}"
                self._leave_out(longest, InputError(reason))
                continue
            components = draft.components if capabilities.traces(draft) else ()
            for done, (prompt, component) in enumerate(itertools.product(self._prompts, components)):
                try:
                    self._trace(prompt, component, max_length, number * len(self._prompts) + done // len(components))
                except EngineError as error:
                    failed.add(component.digest)
                    self._leave_out(longest, error)
                    break
            else:
                usable.append(draft)
        return usable

    def _trace(self, prompt: Prompt, component: Draft, max_length: int, number: int) -> None:
        if (component.digest, prompt.digest) in self._acceptances:
            return
        self._progress("acceptance", number, len(self._engine.drafts) * len(self._prompts))
        trace = self._traces[prompt.digest]
        acceptance = self._engine.trace_draft(self._workload, prompt, trace, component, max_length)
        self._acceptances[component.digest, prompt.digest] = acceptance

    def _composed(self, drafts: Sequence[Draft]) -> set[Draft]:
        """Composites that are not run: alone in a batch the runs of their parts calibrate them."""
        has_parts = self._workload.batch_size == 1 and self._engine.capabilities.times == "steps"
        return {draft for draft in drafts if has_parts and len(set(draft.components) & set(drafts)) > 1}

    def _run_traced(self, drafts: Sequence[Draft], lengths: Sequence[int]) -> None:
        """Runs every draft at its calibration lengths, all of a queue in one unit, plain decoding before each draft.

        Plain decoding is under every speed-up, so it is run as often as there are drafts. When a unit fails, each draft
        is tried alone, so that only the one at fault is left out.
        """
        by_draft = {draft: self._calibration_setups(draft, lengths) for draft in drafts}
        for number in range(len(self._queues)):
            self._progress("calibration", number, len(self._queues))
            try:
                self._run(
                    number, tuple(setup for setups in by_draft.values() for setup in (PLAIN, *setups)) or (PLAIN,)
                )
            except EngineError:
                self._run(number, (PLAIN,))
                by_draft = {draft: setups for draft, setups in by_draft.items() if self._try(number, setups)}

    def _calibration_setups(self, draft: Draft, lengths: Sequence[int]) -> tuple[Setup, ...]:
        setups = [Setup(draft=draft, length=length) for length in lengths]
        usable = [setup.length for setup in setups if self._engine.capabilities.drafts_with(setup)]
        return tuple(Setup(draft=draft, length=length) for length in calibration_lengths(usable))

    def _run_untraced(self, drafts: Sequence[Draft], lengths: Sequence[int]) -> None:
        """Runs every setup beside plain decoding, one after another: an engine may have to restart for each."""
        setups = [Setup(draft=draft, length=length) for draft in drafts for length in lengths]
        setups = [setup for setup in setups if self._engine.capabilities.drafts_with(setup)]
        for done, setup in enumerate(setups):
            self._progress("calibration", done, len(setups))
            for number in range(len(self._queues)):
                if not self._try(number, (PLAIN, setup)):
                    break

    def _try(self, number: int, setups: tuple[Setup, ...]) -> bool:
        try:
            self._run(number, setups)
        except EngineError as error:
            self._leave_out(next(setup for setup in setups if setup != PLAIN), error)
            return False
        return True

    def _run(self, number: int, setups: tuple[Setup, ...]) -> None:
        queue, purpose = self._queues[number], purpose_of("calibration", self._workload, number)
        samples = self._engine.run_together(self._workload, queue, setups, purpose)
        self._runs += [
            (setup, sample) for (setup, _), sample in zip(itertools.product(setups, queue), samples, strict=True)
        ]

    def _leave_out(self, setup: Setup, error: Exception) -> None:
        self._infeasible.append(Infeasible(setup=setup, reason=type(error).__name__, detail=str(error)))
