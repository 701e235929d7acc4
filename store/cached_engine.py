"""An engine with a store in front: stored evidence is answered from there, new evidence is saved at once.

An interrupted run resumes where it stopped, and a second run pays only for what is new.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import Acceptance, Infeasible, Sample, StepTimes, TargetTrace, covers
from profiles.records.keys import run_point, sampling_settings, trace_point, unit_digest
from store.evidence_store import EvidenceStore, Scope
from store.shared_traces import SharedTraces

Evidence = TypeVar("Evidence")
Point = tuple[object, ...]

MAX_REPEATS = 3  # of disturbed timed runs, each in a run of its own


class _StoredUnit(NamedTuple):
    purpose: str
    samples: tuple[Sample, ...]


class CachedEngine:
    """Fits `Engine`. An `EngineError` is stored as an `Infeasible` row, never as a number, and raised again.

    * An engine that was seen to agree with the torch engine takes its traces (`store.shared_traces`).
    * Timings that other programs disturbed are measured again, but not by the object that measured them: a run that
      asks twice gets one answer, whatever other processes save meanwhile.
    * Of a unit that two processes measure at once the first saved answers for both; of step times both are stored.

    `since`: UTC time; older timings do not answer. Traces are pinned by their digests and do not age.
    """

    def __init__(self, engine: Engine, evidence_store: EvidenceStore, since: str = "") -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.drafts = engine.drafts
        self.capabilities = engine.capabilities
        self.answered_by: dict[str, str] = {}  # digest of a unit asked for -> digest under which its answer is stored
        self.measured_units = 0  # by the wrapped engine
        self.measured_seconds = 0.0  # spent in it, failures included
        self.reused_units = 0  # answered from the store, each once, without those that this object measured
        self._engine = engine
        self._timed = engine.capabilities.timed(engine.drafts)
        self._store = evidence_store
        self._shared_traces = SharedTraces(evidence_store)
        self._since = since
        self._sweeps: dict[Point, tuple[int, dict[str, StepTimes]]] = {}  # longest length, times
        self._units: dict[Point, tuple[Sample, ...]] = {}
        self._counted: set[Point] = set()

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        scope, point = self._scope(workload), trace_point(workload, prompt)
        stored = self._store.find_target_trace(scope, prompt) or self._shared_traces.target_trace(scope, prompt)
        if stored is not None:
            return self._reused(stored, point)
        unit = f"target trace, {prompt.domain}"
        trace = self._measure(scope, PLAIN, unit, lambda: self._engine.trace_target(workload, prompt))
        return self._measured(self._store.save_target_trace(scope, prompt, trace), point)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        scope, point = self._scope(workload), (*trace_point(workload, prompt), draft.digest, max_length)
        query = (scope, prompt, draft, max_length)
        stored = self._store.find_acceptance(*query) or self._shared_traces.acceptance(*query)
        if stored is not None:
            return self._reused(stored, point)
        setup, unit = Setup(draft=draft, length=max_length), f"acceptance of {draft.name}, {prompt.domain}"
        acceptance = self._measure(
            scope, setup, unit, lambda: self._engine.trace_draft(workload, prompt, trace, draft, max_length)
        )
        return self._measured(self._store.save_acceptance(scope, prompt, draft, acceptance), point)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        scope, point = self._scope(workload), (workload.batch_size, context_length, sampling_settings(workload))
        longest, times = self._sweeps.get(point, (0, {}))
        if longest >= max_length and covers(times, self.target, self._timed, max_length):
            return self._reused(times, point)
        stored = self._store.find_step_times(
            scope, self._timed, context_length=context_length, max_length=max_length, since=self._since
        )
        if stored is not None and not _is_disturbed(stored.values()):
            self._sweeps[point] = (max_length, stored)
            return self._reused(stored, point)
        unit = f"step times at batch {workload.batch_size}, context {context_length}"
        times = self._measure(scope, PLAIN, unit, lambda: self._engine.time_steps(workload, context_length, max_length))
        self._store.save_step_times(scope, self._timed, max_length, times)
        self._sweeps[point] = (max_length, times)
        return self._measured(times, point)

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        scope, point = self._scope(workload), run_point(workload, prompts, setups, purpose)
        if point in self._units:
            return self._reused(self._units[point], point)
        answer, next_purpose = self._stored_units(scope, prompts, setups, purpose)
        is_measured = answer is None or next_purpose is not None
        if is_measured:
            unit = f"{purpose}: {', '.join(setup.name for setup in setups)}, {prompts[0].domain}"
            drafting = [setup for setup in dict.fromkeys(setups) if setup != PLAIN]
            suspect = None if len(drafting) > 1 else (drafting or [PLAIN])[0]  # of several each is tried alone
            samples = self._measure(
                scope, suspect, unit, lambda: self._engine.run_together(workload, prompts, setups, purpose)
            )
            # another process's samples, if it was faster
            samples = self._store.save_samples(scope, prompts, setups, next_purpose or purpose, samples)
            answer = _StoredUnit(next_purpose or purpose, samples)
        assert answer is not None
        self._units[point] = answer.samples
        stored_point = run_point(workload, prompts, setups, answer.purpose)
        self.answered_by[self._unit_digest(point)] = self._unit_digest(stored_point)
        return (self._measured if is_measured else self._reused)(answer.samples, point)

    def _stored_units(
        self, scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[_StoredUnit | None, str | None]:
        """The stored unit that answers, and the purpose to measure it again under; None: that is not needed.

        A repeat is stored under a purpose of its own. Of those young enough the latest undisturbed unit answers, else
        the latest. It does so for good when one was undisturbed or four were not.
        """
        young: list[_StoredUnit] = []
        for number in itertools.count():
            name = purpose if number == 0 else f"{purpose}, again {number}"
            samples = self._store.find_samples(scope, prompts, setups, name)
            if samples is None:
                break
            if not self._since or self._store.find_samples(scope, prompts, setups, name, self._since) is not None:
                young.append(_StoredUnit(name, samples))
        undisturbed = [unit for unit in young if not _is_disturbed(unit.samples)]
        is_final = bool(undisturbed) or len(young) > MAX_REPEATS
        return next(reversed(undisturbed or young), None), None if is_final else name

    def _unit_digest(self, point: tuple[str, ...]) -> str:
        return unit_digest(self.target, self.environment, point)

    def _scope(self, workload: Workload) -> Scope:
        origin = self.capabilities.origin
        return Scope(target=self.target, environment=self.environment, workload=workload, origin=origin)

    def _measure(self, scope: Scope, suspect: Setup | None, unit: str, measure: Callable[[], Evidence]) -> Evidence:
        """What the wrapped engine measures, its seconds counted; a failure is stored for `suspect` with the unit."""
        start = time.perf_counter()
        try:
            return measure()
        except EngineError as error:
            if suspect is not None:
                failure = Infeasible(setup=suspect, reason=type(error).__name__, detail=f"{error} (in {unit})")
                self._store.save_infeasible(scope, failure)
            raise
        finally:
            self.measured_seconds += time.perf_counter() - start

    def _measured(self, evidence: Evidence, point: Point) -> Evidence:
        self.measured_units += 1
        self._counted.add(point)
        return evidence

    def _reused(self, evidence: Evidence, point: Point) -> Evidence:
        self.reused_units += point not in self._counted
        self._counted.add(point)
        return evidence


def _is_disturbed(timings: Iterable[Sample | StepTimes]) -> bool:
    return any(timing.disturbed for timing in timings)
