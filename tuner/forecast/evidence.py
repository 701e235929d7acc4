"""Gathers what forecasts need from an engine: target traces, acceptance, staircases and a few calibration runs.

Each call to the engine is one unit, so a remembering engine makes this resumable; a draft that fails is dropped with
its reason and the rest goes on. Knows only the engine protocol.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from profiles.acceptance.expected_rounds import Replayed, joined
from profiles.engines.base import TORCH, Engine, EngineCapabilities
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError, NotMeasuredError
from profiles.records.evidence import Acceptance, Infeasible, Sample, StepTimes, TargetTrace
from profiles.stats import median

CALIBRATION_PROMPTS = {"steps": 3, "rounds": 6}  # at batch 1; rounds of a run are their only check, and runs are short
CALIBRATION_QUEUES = (2, 2)  # in a batch: how many queues, and their length in batches
LEAST_PROMPTS = 2  # for an interval over prompts
QUEUE_BATCHES = 4  # of a queue that keeps the batch full
CONTEXT_STEP = 32  # anchors are rounded up to this many tokens, so that like prompt sets share a staircase

Progress = Callable[[str, int, int], None]


class Traced(Protocol):
    """A prompt as far as evidence is found by it."""

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything one workload's forecasts rest on; keys are prompt, (draft's part, prompt) and part digests.

    Drafts that the engine does not trace were run at every length: all that is known of them is in `calibration`.
    """

    prompts: tuple[Prompt, ...]
    traces: dict[str, TargetTrace]
    acceptances: dict[tuple[str, str], Acceptance]
    steps: dict[str, StepTimes]
    calibration: tuple[tuple[Setup, Sample], ...]
    drafts: tuple[Draft, ...]
    infeasible: tuple[Infeasible, ...]
    capabilities: EngineCapabilities = TORCH

    def traces_of(self, draft: Draft) -> bool:
        """Whether the engine traced it, else it was only run."""
        return self.capabilities.traces(draft)

    @property
    def parts(self) -> tuple[Draft, ...]:
        """What was traced and timed: the drafts, of composites their parts, each once."""
        traced = self.capabilities.timed(self.drafts)
        return tuple({part.digest: part for draft in traced for part in draft.components}.values())

    def can_tell(self, setup: Setup) -> bool:
        """Whether a forecast can be made: of a draft that was only run, for lengths at which two prompts were timed."""
        if setup.draft is None:
            return True
        known = self.traces_of(setup.draft) or len(self.prompts_of(setup) & self.prompts_of(PLAIN)) >= LEAST_PROMPTS
        return known and self.capabilities.drafts_with(setup)

    def prompts_of(self, setup: Setup) -> set[str]:
        """Digests of the prompts that a setup was run on and that had a second token, so a time per token."""
        return {one.prompt_digest for own, one in self.calibration if own == setup and one.output_tokens > 1}

    def acceptance(self, draft: Draft, prompt: Traced) -> Replayed:
        """How a draft did on a prompt's trace. Raises NotMeasuredError when a part was not measured."""
        found = [self.acceptances.get((part.digest, prompt.digest)) for part in draft.components]
        if None in found:
            raise NotMeasuredError(f"acceptance of {draft.name} on prompt {prompt.digest} is not known")
        return joined([one for one in found if one is not None])


def calibration_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The one or two lengths whose real runs set the per-round overhead; they are not used to grade forecasts."""
    ordered = sorted(set(lengths))
    return tuple(dict.fromkeys((ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])))


def typical_context(workload: Workload, prompts: Sequence[Prompt]) -> int:
    """Tokens in the cache halfway through a typical run, rounded up to a multiple of 32 within the context."""
    tokens = median(len(prompt.token_ids) for prompt in prompts) + workload.max_new_tokens / 2
    return min(int(-(-tokens // CONTEXT_STEP)) * CONTEXT_STEP, workload.context_length)


def spread_over_domains(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """`count` prompts, each domain with its share of the whole; all of them when there are no more."""
    sizes = Counter(prompt.domain for prompt in prompts)
    seen: Counter[str] = Counter()
    places = []
    for prompt in prompts:
        places.append((seen[prompt.domain] + 0.5) / sizes[prompt.domain])
        seen[prompt.domain] += 1
    order = sorted(range(len(prompts)), key=lambda index: places[index])
    return tuple(prompts[index] for index in order[:count])


def queues(
    prompts: Sequence[Prompt], batch_size: int, alone: int, in_batch: tuple[int, int]
) -> tuple[tuple[Prompt, ...], ...]:
    """What is run together: at batch 1 each of `alone` prompts, at most as many as there are.

    In a batch queues, `in_batch` is how many and their length in batches: they go round the prompts as often as it
    takes, each beginning where the last one ended.
    """
    if batch_size == 1:
        return tuple((prompt,) for prompt in spread_over_domains(prompts, alone))
    count, num_batches = in_batch
    endless = itertools.cycle(spread_over_domains(prompts, len(prompts)))
    return tuple(tuple(itertools.islice(endless, num_batches * batch_size)) for _ in range(count))


def purpose_of(purpose: str, workload: Workload, number: int) -> str:
    """At batch 1 anchors share their runs of a prompt; in a batch the same queue may be run again for its noise."""
    return f"{purpose} {0 if workload.batch_size == 1 else number}"


def gather(
    engine: Engine, workload: Workload, prompts: Sequence[Prompt], lengths: Sequence[int], progress: Progress
) -> Evidence:
    """Measures or recalls all evidence for one workload. Raises InputError when there are no prompts."""
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    max_length, properties = max(lengths), engine.capabilities
    traces: dict[str, TargetTrace] = {}
    for done, prompt in enumerate(prompts):
        progress("target trace", done, len(prompts))
        traces[prompt.digest] = engine.trace_target(workload, prompt)
    tracing = _Tracing(engine, workload, traces, progress)
    usable = tracing.run(prompts, max_length)
    progress("step times", 0, 1)
    steps = engine.time_steps(workload, typical_context(workload, prompts), max_length)
    if properties.times == "rounds":
        steps = _with_idle_rounds(steps, steps[engine.target.run_digest].samples_s[1])
    calibration = _Calibration(engine, workload, prompts, progress)
    calibration.run_traced(properties.timed(usable), lengths)
    calibration.run_alone(
        [
            setup
            for draft in usable
            for setup in (Setup(draft=draft, length=k) for k in lengths)
            if not properties.traces(draft) and properties.drafts_with(setup)
        ]
    )
    failed = {one.setup for one in calibration.infeasible}
    failed_drafts = {setup.draft for setup in failed}
    return Evidence(
        prompts=tuple(prompts),
        traces=traces,
        acceptances=tracing.acceptances,
        steps=steps,
        calibration=tuple((setup, sample) for setup, sample in calibration.found if setup not in failed),
        drafts=tuple(draft for draft in usable if not properties.traces(draft) or draft not in failed_drafts),
        infeasible=(*tracing.infeasible, *calibration.infeasible),
        capabilities=properties,
    )


def _with_idle_rounds(rounds: Mapping[str, StepTimes], plain_s: tuple[float, ...]) -> dict[str, StepTimes]:
    """A draft whose engine never lets it propose nothing has no such round: a plain one stands for it."""
    return {part: replace(times, samples_s={1: plain_s, **times.samples_s}) for part, times in rounds.items()}


class _Tracing:
    """The drafts over the target's traces: what they accept, and which of them failed."""

    def __init__(
        self, engine: Engine, workload: Workload, traces: Mapping[str, TargetTrace], progress: Progress
    ) -> None:
        self.acceptances: dict[tuple[str, str], Acceptance] = {}
        self.infeasible: list[Infeasible] = []
        self._engine = engine
        self._workload = workload
        self._traces = traces
        self._progress = progress

    def run(self, prompts: Sequence[Prompt], max_length: int) -> list[Draft]:
        """The drafts that can go on: traced, or of a kind that the engine does not trace."""
        drafts, properties = self._engine.drafts, self._engine.capabilities
        usable: list[Draft] = []
        failed_parts: set[str] = set()
        for number, draft in enumerate(drafts):
            if failed_parts.intersection(part.digest for part in draft.components):
                continue  # a composite of what failed already, which is said once
            parts = draft.components if properties.traces(draft) else ()
            longest = Setup(draft=draft, length=max_length)
            if not properties.drafts_with(longest):
                detail = f"{properties.name} drafts nothing with it at lengths up to {max_length}"
                self.infeasible.append(Infeasible(setup=longest, reason="InputError", detail=detail))
                continue
            try:
                for done, (prompt, part) in enumerate(itertools.product(prompts, parts)):
                    place = number * len(prompts) + done // len(parts)
                    self._trace(prompt, part, max_length, (place, len(drafts) * len(prompts)))
                usable.append(draft)
            except EngineError as error:
                failed_parts.add(part.digest)
                self.infeasible.append(Infeasible(setup=longest, reason=type(error).__name__, detail=str(error)))
        return usable

    def _trace(self, prompt: Prompt, part: Draft, max_length: int, place: tuple[int, int]) -> None:
        if (part.digest, prompt.digest) not in self.acceptances:
            self._progress("acceptance", *place)
            trace = self._traces[prompt.digest]
            acceptance = self._engine.trace_draft(self._workload, prompt, trace, part, max_length)
            self.acceptances[part.digest, prompt.digest] = acceptance


class _Calibration:
    """The real runs under way: what ran, and what could not."""

    def __init__(self, engine: Engine, workload: Workload, prompts: Sequence[Prompt], progress: Progress) -> None:
        self.found: list[tuple[Setup, Sample]] = []
        self.infeasible: list[Infeasible] = []
        self._engine = engine
        self._workload = workload
        alone = CALIBRATION_PROMPTS[engine.capabilities.times]
        self._queues = queues(prompts, workload.batch_size, alone, CALIBRATION_QUEUES)
        self._progress = progress

    def run_traced(self, drafts: Sequence[Draft], lengths: Sequence[int]) -> None:
        """Every (draft, calibration length), all of a queue in one unit, plain decoding before each draft.

        Plain decoding is under every speed-up, so it is run as often as there are drafts. When a unit fails, each draft
        is tried alone, so that the one at fault is found and the rest goes on. Raises EngineError when plain decoding
        fails.
        """
        by_draft = {draft: self._calibrated(draft, lengths) for draft in drafts}
        for number in range(len(self._queues)):
            self._progress("calibration", number, len(self._queues))
            try:
                self._run(number, tuple(setup for own in by_draft.values() for setup in (PLAIN, *own)) or (PLAIN,))
            except EngineError:
                self._run(number, (PLAIN,))
                for draft, own in list(by_draft.items()):
                    if not self._try(number, tuple(own)):
                        del by_draft[draft]

    def _calibrated(self, draft: Draft, lengths: Sequence[int]) -> list[Setup]:
        asked = [Setup(draft=draft, length=k) for k in lengths]
        drafting = [setup.length for setup in asked if self._engine.capabilities.drafts_with(setup)]
        return [Setup(draft=draft, length=k) for k in calibration_lengths(drafting)]

    def run_alone(self, setups: Sequence[Setup]) -> None:
        """Each setup beside plain decoding, one after another: an engine may have to start anew for every one."""
        for done, setup in enumerate(setups):
            self._progress("calibration", done, len(setups))
            for number in range(len(self._queues)):
                if not self._try(number, (PLAIN, setup)):
                    break

    def _try(self, number: int, setups: tuple[Setup, ...]) -> bool:
        try:
            self._run(number, setups)
        except EngineError as error:
            at_fault = next(setup for setup in setups if setup != PLAIN)
            self.infeasible.append(Infeasible(setup=at_fault, reason=type(error).__name__, detail=str(error)))
            return False
        return True

    def _run(self, number: int, setups: tuple[Setup, ...]) -> None:
        queue, purpose = self._queues[number], purpose_of("calibration", self._workload, number)
        samples = self._engine.run_together(self._workload, queue, setups, purpose)
        self.found += [
            (setup, sample) for (setup, _), sample in zip(itertools.product(setups, queue), samples, strict=True)
        ]
