"""An engine that answers from recorded evidence, and one that records another engine's answers.

Tests run anywhere on a recording; a question that was never recorded raises NotMeasuredError.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from profiles.engines.base import TORCH, Engine, EngineCapabilities
from profiles.records.codec import from_builtins, to_json
from profiles.records.core import Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import (
    Acceptance,
    AcceptanceTrace,
    LookupTrace,
    Sample,
    StepTimes,
    TargetTrace,
    covers,
)
from profiles.records.keys import Key, run_point, trace_point

Sweep = tuple[int, dict[str, StepTimes]]  # longest speculation length asked for, step times by component digest


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
            raise NotMeasuredError(f"the target's trace of {_name(prompt)} was never measured")
        return trace

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        acceptance = self.acceptances.get((*trace_point(workload, prompt), draft.digest))
        point = f"the acceptance of {draft.name} on {_name(prompt)}"
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
            shown = _name(prompts[0]) + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
            raise NotMeasuredError(f"runs of {names} on {shown} for {purpose!r} were never measured")
        return samples

    def save(self, path: Path) -> None:
        """Write the recording as JSON."""
        document = {
            "environment": self.environment,
            "target": self.target,
            "drafts": self.drafts,
            "capabilities": self.capabilities,
            "target_traces": MappingProxyType(self.target_traces),
            "acceptances": MappingProxyType(self.acceptances),
            "sweeps": [
                [*point, max_length, list(times.values())] for point, (max_length, times) in self.sweeps.items()
            ],
            "samples": MappingProxyType(self.samples),
        }
        path.write_text(to_json(document), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "RecordedEngine":
        """Read what `save` wrote; equal to what was saved."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            environment=_record(Environment, document["environment"]),
            target=_record(Model, document["target"]),
            drafts=_record(tuple[Draft, ...], document["drafts"]),
            capabilities=_record(EngineCapabilities, document["capabilities"]),
            target_traces={tuple(key): _record(TargetTrace, raw) for *key, raw in document["target_traces"]},
            acceptances={
                tuple(key): _record(LookupTrace if "max_length" in raw else AcceptanceTrace, raw)
                for *key, raw in document["acceptances"]
            },
            sweeps={
                (batch_size, context_length): (max_length, _by_component(parts))
                for batch_size, context_length, max_length, parts in document["sweeps"]
            },
            samples={tuple(key): tuple(_record(Sample, raw) for raw in unit) for *key, unit in document["samples"]},
        )


def _record(kind: Any, raw: Any) -> Any:
    return from_builtins(kind, raw, "recording")


def _by_component(parts: list[Any]) -> dict[str, StepTimes]:
    return {times.component_digest: times for times in (_record(StepTimes, raw) for raw in parts)}


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


def _name(prompt: Prompt) -> str:
    return f"prompt {prompt.digest[:8]} ({prompt.domain}) with this sampling"
