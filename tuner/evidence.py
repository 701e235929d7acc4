"""Gathers what forecasts need from an engine: target traces, acceptance, staircases and a few calibration runs.

Each call to the engine is one unit, so a remembering engine makes this resumable; a draft that fails is dropped with
its reason and the rest goes on. Knows only the engine protocol.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from profiles.errors import EngineError, InputError, NotMeasuredError
from profiles.formulas import Replayed, joined, median
from profiles.protocol import Engine
from profiles.terms import (
    PLAIN,
    Acceptance,
    Draft,
    Infeasible,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
)

CALIBRATION_PROMPTS = 3  # at batch 1
CALIBRATION_QUEUES = (2, 2)  # in a batch: how many queues, and their length in batches
QUEUE_BATCHES = 4  # of a queue that keeps the batch full
CONTEXT_STEP = 32  # anchors are rounded up to this many tokens, so that like prompt sets share a staircase

Progress = Callable[[str, int, int], None]


class Traced(Protocol):
    """A prompt as far as evidence is found by it."""

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything one workload's forecasts rest on; keys are prompt, (draft's part, prompt) and part digests."""

    prompts: tuple[Prompt, ...]
    traces: dict[str, TargetTrace]
    acceptances: dict[tuple[str, str], Acceptance]
    steps: dict[str, StepTimes]
    calibration: tuple[tuple[Setup, Sample], ...]
    drafts: tuple[Draft, ...]
    infeasible: tuple[Infeasible, ...]

    @property
    def parts(self) -> tuple[Draft, ...]:
        """What was traced and timed: the drafts, of composites their parts, each once."""
        return tuple({part.digest: part for draft in self.drafts for part in draft.parts}.values())

    def acceptance(self, draft: Draft, prompt: Traced) -> Replayed:
        """How a draft did on a prompt's trace. Raises NotMeasuredError when a part was not measured."""
        found = [self.acceptances.get((part.digest, prompt.digest)) for part in draft.parts]
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


def occasion_of(purpose: str, workload: Workload, number: int) -> str:
    """At batch 1 anchors share their runs of a prompt; in a batch the same queue may be run again for its noise."""
    return f"{purpose} {0 if workload.batch_size == 1 else number}"


def gather(
    engine: Engine, workload: Workload, prompts: Sequence[Prompt], lengths: Sequence[int], progress: Progress
) -> Evidence:
    """Measures or recalls all evidence for one workload. Raises InputError when there are no prompts."""
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    max_length = max(lengths)
    traces: dict[str, TargetTrace] = {}
    for done, prompt in enumerate(prompts):
        progress("target trace", done, len(prompts))
        traces[prompt.digest] = engine.trace_target(workload, prompt)
    acceptances: dict[tuple[str, str], Acceptance] = {}
    usable: list[Draft] = []
    infeasible: list[Infeasible] = []
    failed_parts: set[str] = set()
    for number, draft in enumerate(engine.drafts):
        if failed_parts.intersection(part.digest for part in draft.parts):
            continue  # a composite of what failed already, which is said once
        try:
            for done, (prompt, part) in enumerate(itertools.product(prompts, draft.parts)):
                if (part.digest, prompt.digest) in acceptances:
                    continue
                progress(
                    "acceptance", number * len(prompts) + done // len(draft.parts), len(engine.drafts) * len(prompts)
                )
                trace = traces[prompt.digest]
                acceptance = engine.trace_draft(workload, prompt, trace, part, max_length)
                acceptances[part.digest, prompt.digest] = acceptance
            usable.append(draft)
        except EngineError as error:
            failed_parts.add(part.digest)
            setup = Setup(draft=draft, length=max_length)
            infeasible.append(Infeasible(setup=setup, reason=type(error).__name__, detail=str(error)))
    progress("step times", 0, 1)
    steps = engine.time_steps(workload, typical_context(workload, prompts), max_length)
    calibration, failed = _calibrate(engine, workload, prompts, (tuple(usable), lengths), progress)
    infeasible += failed
    usable = [draft for draft in usable if draft not in {one.setup.draft for one in failed}]
    return Evidence(
        prompts=tuple(prompts),
        traces=traces,
        acceptances=acceptances,
        steps=steps,
        calibration=tuple(calibration),
        drafts=tuple(usable),
        infeasible=tuple(infeasible),
    )


def _calibrate(
    engine: Engine,
    workload: Workload,
    prompts: Sequence[Prompt],
    asked: tuple[tuple[Draft, ...], Sequence[int]],
    progress: Progress,
) -> tuple[list[tuple[Setup, Sample]], list[Infeasible]]:
    """Real runs of every (draft, calibration length), all of a queue in one unit, plain decoding before each draft.

    Plain decoding is under every speed-up, so it is run as often as there are drafts. When a unit fails, each draft is
    tried alone, so that the one at fault is found and the rest goes on. Raises EngineError when plain decoding fails.
    """
    drafts, lengths = asked
    by_draft = {draft: [Setup(draft=draft, length=k) for k in calibration_lengths(lengths)] for draft in drafts}
    found: list[tuple[Setup, Sample]] = []
    infeasible: list[Infeasible] = []
    chosen = queues(prompts, workload.batch_size, CALIBRATION_PROMPTS, CALIBRATION_QUEUES)

    def run(queue: tuple[Prompt, ...], setups: tuple[Setup, ...]) -> list[tuple[Setup, Sample]]:
        samples = engine.run_together(workload, queue, setups, occasion_of("calibration", workload, done))
        return [(setup, sample) for (setup, _), sample in zip(itertools.product(setups, queue), samples, strict=True)]

    for done, queue in enumerate(chosen):
        progress("calibration", done, len(chosen))
        setups = tuple(setup for own in by_draft.values() for setup in (PLAIN, *own)) or (PLAIN,)
        try:
            found += run(queue, setups)
        except EngineError:
            found += run(queue, (PLAIN,))
            for draft, own in list(by_draft.items()):
                try:
                    found += run(queue, tuple(own))
                except EngineError as error:
                    del by_draft[draft]
                    infeasible.append(Infeasible(setup=own[0], reason=type(error).__name__, detail=str(error)))
    return found, infeasible
