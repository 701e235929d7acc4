"""An engine answered from evidence held in memory, one that records another, and records as plain JSON values.

Searches and tests run anywhere on a recording, and a point never measured raises instead of being guessed. It must
not know torch, files other than a recording's, or how evidence was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles.engines.base import TORCH, Engine, EngineCapabilities
from profiles.records.codec import (
    _tuples,
    acceptance_from,
    draft_from,
    environment_from,
    model_from,
    plain,
    sample_from,
    step_times_from,
    target_trace_from,
)
from profiles.records.core import CATCH_UP_WIDTHS, Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.evidence import Acceptance, LookupTrace, Sample, StepTimes, TargetTrace
from profiles.records.keys import Key, run_point, trace_point

RECORDING_VERSION = 3  # 1: the first form; 2: shapes and refills of a sample; 3: the engine's properties


Sweep = tuple[int, dict[str, StepTimes]]  # longest speculation length asked for, staircases by part digest


def is_of_rounds(times: Mapping[str, StepTimes], target: Model) -> bool:
    """Whether a sweep is of an engine that times whole rounds: its target has width 1 alone, a plain round."""
    staircase = times.get(target.run_digest)
    return staircase is not None and set(staircase.samples_s) == {1}


def covers(times: Mapping[str, StepTimes], target: Model, drafts: tuple[Draft, ...], max_length: int) -> bool:
    """Whether a sweep has the target at widths 1..max_length+1 and every part of every draft.

    The model of a composite is needed at all widths of a first step. Of whole rounds every length of every draft is
    needed. `drafts` are those that are traced (`EngineCapabilities.timed`): others have no step times.
    """
    staircase = times.get(target.run_digest)
    if is_of_rounds(times, target):
        lengths = set(range(2, max_length + 2))
        return all(draft.digest in times and lengths <= set(times[draft.digest].samples_s) for draft in drafts)
    if staircase is None or not set(range(1, max_length + 2)) <= set(staircase.samples_s):
        return False
    if not all(part.digest in times for draft in drafts for part in draft.components):
        return False
    models = [draft.components[1].digest for draft in drafts if draft.kind == "composite"]
    return all(set(CATCH_UP_WIDTHS) <= times[model].samples_s.keys() for model in models)


@dataclass(slots=True, kw_only=True)
class RecordedEngine:
    """Fits `Engine`; answers what it holds, under the keys the store uses too. Raises NotMeasuredError otherwise."""

    environment: Environment
    target: Model
    drafts: tuple[Draft, ...]
    capabilities: EngineCapabilities = TORCH
    target_traces: dict[Key, TargetTrace] = field(default_factory=dict)
    acceptances: dict[Key, Acceptance] = field(default_factory=dict)
    sweeps: dict[tuple[int, int], Sweep] = field(default_factory=dict)
    samples: dict[Key, tuple[Sample, ...]] = field(default_factory=dict)

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        trace = self.target_traces.get(trace_point(workload, prompt))
        if trace is None:
            raise NotMeasuredError(f"the target's trace of {_named(prompt)} was never measured")
        return trace

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        acceptance = self.acceptances.get((*trace_point(workload, prompt), draft.digest))
        point = f"the acceptance of {draft.name} on {_named(prompt)}"
        if acceptance is None:
            raise NotMeasuredError(f"{point} was never measured")
        if isinstance(acceptance, LookupTrace) and acceptance.max_length < max_length:
            raise NotMeasuredError(f"{point} was measured up to k={acceptance.max_length}, not k={max_length}")
        if self.target_traces.get(trace_point(workload, prompt), trace) != trace:
            raise NotMeasuredError(f"{point} was measured over another target trace")
        return acceptance

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        measured, times = self.sweeps.get((workload.batch_size, context_length), (0, {}))
        point = f"step times at batch {workload.batch_size}, context {context_length}"
        if not times:
            raise NotMeasuredError(f"{point} were never measured")
        if measured < max_length or not covers(times, self.target, self.capabilities.timed(self.drafts), max_length):
            raise NotMeasuredError(f"{point} were measured up to k={measured}, not every part up to k={max_length}")
        return dict(times)

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        samples = self.samples.get(run_point(workload, prompts, setups, purpose))
        if samples is None:
            names = ", ".join(setup.name for setup in setups)
            shown = _named(prompts[0]) + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
            raise NotMeasuredError(f"runs of {names} on {shown} for {purpose!r} were never measured")
        return samples

    def save(self, path: Path) -> None:
        """Write the recording as JSON."""
        document = {
            "recording_version": RECORDING_VERSION,
            "environment": plain(self.environment),
            "target": plain(self.target),
            "drafts": plain(self.drafts),
            "properties": plain(self.capabilities),
            "target_traces": plain(self.target_traces),
            "acceptances": plain(self.acceptances),
            "sweeps": [
                [*anchor, max_length, plain(list(times.values()))]
                for anchor, (max_length, times) in self.sweeps.items()
            ],
            "samples": plain(self.samples),
        }
        path.write_text(json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "RecordedEngine":
        """Read what `save` wrote; equal to what was saved. Raises InputError: unreadable or of another version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            version = document["recording_version"]
            if version != RECORDING_VERSION:
                raise InputError(f"it has version {version}, this draftpick reads version {RECORDING_VERSION}")
            return cls._from(document)
        except (OSError, LookupError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"recording {path} cannot be read: {reason}") from error

    @classmethod
    def _from(cls, document: Mapping[str, Any]) -> "RecordedEngine":
        return cls(
            environment=environment_from(document["environment"]),
            target=model_from(document["target"]),
            drafts=tuple(draft_from(data) for data in document["drafts"]),
            capabilities=EngineCapabilities(**_tuples(document["properties"])),
            target_traces={tuple(key): target_trace_from(data) for *key, data in document["target_traces"]},
            acceptances={tuple(key): acceptance_from(data) for *key, data in document["acceptances"]},
            sweeps={
                (batch_size, context_length): (max_length, _by_part(parts))
                for batch_size, context_length, max_length, parts in document["sweeps"]
            },
            samples={tuple(key): tuple(sample_from(data) for data in unit) for *key, unit in document["samples"]},
        )


class Recorder:
    """Fits `Engine`; passes every question on and collects the answers in `recording`, the newest of equal keys."""

    def __init__(self, engine: Engine) -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.drafts = engine.drafts
        self.capabilities = engine.capabilities
        self._engine = engine
        self.recording = RecordedEngine(
            environment=engine.environment, target=engine.target, drafts=engine.drafts, capabilities=engine.capabilities
        )

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        trace = self._engine.trace_target(workload, prompt)
        self.recording.target_traces[trace_point(workload, prompt)] = trace
        return trace

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        acceptance = self._engine.trace_draft(workload, prompt, trace, draft, max_length)
        self.recording.acceptances[*trace_point(workload, prompt), draft.digest] = acceptance
        return acceptance

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        times = self._engine.time_steps(workload, context_length, max_length)
        self.recording.sweeps[workload.batch_size, context_length] = (max_length, dict(times))
        return times

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        samples = self._engine.run_together(workload, prompts, setups, purpose)
        self.recording.samples[run_point(workload, prompts, setups, purpose)] = samples
        return samples


def _by_part(parts: list[Mapping[str, Any]]) -> dict[str, StepTimes]:
    return {times.component_digest: times for times in map(step_times_from, parts)}


def _named(prompt: Prompt) -> str:
    return f"prompt {prompt.digest[:8]} ({prompt.domain}) with this sampling"
