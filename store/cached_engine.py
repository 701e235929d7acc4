"""An engine that remembers: it looks in the book first, and saves at once what the wrapped engine had to measure.

An interrupted run resumes where it stopped, and a second run pays only for what is new. It must not know how the
wrapped engine measures, nor why it is asked.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from profiles.engines.base import Engine
from profiles.engines.recorded import covers
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import Acceptance, Infeasible, Sample, StepTimes, TargetTrace
from profiles.records.keys import run_point, trace_point, unit_digest
from store.evidence_store import EvidenceStore, Scope
from store.shared_traces import Sharing

Evidence = TypeVar("Evidence")

MAX_REPEATS = 3  # of disturbed timed runs, each in a run of its own


class CachedEngine:
    """Fits `Engine`. An `EngineError` is kept as an `Infeasible` row, never as a number, and raised again.

    An engine seen to agree with ours takes our traces (`store.shared_traces`).

    Timings that other programs disturbed are measured again, but not by the object that measured them: a run that asks
    twice gets one answer, whatever other processes save meanwhile. Of a unit that two measure at once the first saved
    answers for both; of step times both are kept. Timings from before `since` (UTC) do not answer; traces are pinned by
    their digests and do not age. `measured_seconds` is the time spent in the wrapped engine, failures included;
    `answered_by` maps the id of every unit of runs that was asked for to the id under which the answer is kept. A unit
    counts once as reused, and not when this object measured it.
    """

    def __init__(self, engine: Engine, evidence_store: EvidenceStore, since: str = "") -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.drafts = engine.drafts
        self.capabilities = engine.capabilities
        self._engine = engine
        self._timed = engine.capabilities.timed(engine.drafts)
        self._book = evidence_store
        self._sharing = Sharing(evidence_store)
        self._since = since
        self._sweeps: dict[tuple[object, ...], tuple[int, dict[str, StepTimes]]] = {}  # longest length, times
        self._runs: dict[tuple[object, ...], tuple[Sample, ...]] = {}
        self._counted: set[tuple[object, ...]] = set()
        self.answered_by: dict[str, str] = {}
        self.measured_units = 0
        self.measured_seconds = 0.0
        self.reused_units = 0

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        scope, point = self._scope(workload), trace_point(workload, prompt)
        found = self._book.find_target_trace(scope, prompt) or self._sharing.target_trace(scope, prompt)
        if found is not None:
            return self._reused(found, point)
        unit = f"target trace, {prompt.domain}"
        trace = self._measured(scope, PLAIN, unit, lambda: self._engine.trace_target(workload, prompt))
        kept = self._book.save_target_trace(scope, prompt, trace, first_answers=True)
        return self._kept(kept, point)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        scope, point = self._scope(workload), (*trace_point(workload, prompt), draft.digest, max_length)
        asked = (scope, prompt, draft, max_length)
        found = self._book.find_acceptance(*asked) or self._sharing.acceptance(*asked)
        if found is not None:
            return self._reused(found, point)
        setup, unit = Setup(draft=draft, length=max_length), f"acceptance of {draft.name}, {prompt.domain}"
        acceptance = self._measured(
            scope, setup, unit, lambda: self._engine.trace_draft(workload, prompt, trace, draft, max_length)
        )
        kept = self._book.save_acceptance(scope, prompt, draft, acceptance, first_answers=True)
        return self._kept(kept, point)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        scope, point = self._scope(workload), (workload.batch_size, context_length)
        longest, known = self._sweeps.get(point, (0, {}))
        if longest >= max_length and covers(known, self.target, self._timed, max_length):
            return self._reused(known, point)
        found = self._book.find_step_times(scope, self._timed, (context_length, max_length), self._since)
        if found is not None and not _disturbed(found.values()):
            self._sweeps[point] = (max_length, found)
            return self._reused(found, point)
        unit = f"step times at batch {workload.batch_size}, context {context_length}"
        times = self._measured(
            scope, PLAIN, unit, lambda: self._engine.time_steps(workload, context_length, max_length)
        )
        self._book.save_step_times(scope, self._timed, max_length, times)
        self._sweeps[point] = (max_length, times)
        return self._kept(times, point)

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        scope, point = self._scope(workload), run_point(workload, prompts, setups, purpose)
        if point in self._runs:
            return self._reused(self._runs[point], point)
        known, free = self._recall(scope, prompts, setups, purpose)
        if known is not None and free is None:
            answering, self._runs[point] = known
            self._note(workload, prompts, setups, (purpose, answering))
            return self._reused(self._runs[point], point)
        assert free is not None  # what is not known has an occasion to be measured under
        unit = f"{purpose}: {', '.join(setup.name for setup in setups)}, {prompts[0].domain}"
        drafting = [setup for setup in dict.fromkeys(setups) if setup != PLAIN]
        suspect = drafting[0] if len(drafting) == 1 else PLAIN
        samples = self._measured(
            scope, suspect, unit, lambda: self._engine.run_together(workload, prompts, setups, purpose)
        )
        kept = self._book.save_samples(scope, prompts, setups, free, samples)  # another process's, if it was faster
        self._runs[point] = kept
        self._note(workload, prompts, setups, (purpose, free))
        return self._kept(kept, point)

    def _recall(
        self, scope: Scope, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[tuple[str, tuple[Sample, ...]] | None, str | None]:
        """The runs of a unit that answer, with their occasion, and the occasion to repeat it under.

        A repeat is stored under an occasion of its own. Of those young enough the latest undisturbed runs answer, else
        the latest; without an occasion to repeat they do so for good, because one was undisturbed or four were not.
        """
        young: list[tuple[str, tuple[Sample, ...]]] = []
        for number in itertools.count():
            name = purpose if number == 0 else f"{purpose}, again {number}"
            samples = self._book.find_samples(scope, prompts, setups, name)
            if samples is None:
                break
            if not self._since or self._book.find_samples(scope, prompts, setups, name, self._since) is not None:
                young.append((name, samples))
        quiet = [one for one in young if not _disturbed(one[1])]
        done = bool(quiet) or len(young) > MAX_REPEATS
        return next(reversed(quiet or young), None), None if done else name

    def _note(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], occasions: tuple[str, str]
    ) -> None:
        """Remembers under which id the unit that was asked for is really kept."""
        asked, answering = (
            unit_digest(self.target, self.environment, run_point(workload, prompts, setups, purpose))
            for purpose in occasions
        )
        self.answered_by[asked] = answering

    def _scope(self, workload: Workload) -> Scope:
        origin = self.capabilities.origin
        return Scope(target=self.target, environment=self.environment, workload=workload, origin=origin)

    def _measured(self, scope: Scope, setup: Setup, unit: str, measure: Callable[[], Evidence]) -> Evidence:
        """What the wrapped engine says, its seconds counted; a failure is put down to `setup`, with the unit named."""
        start = time.perf_counter()
        try:
            try:
                return measure()
            finally:
                self.measured_seconds += time.perf_counter() - start
        except EngineError as error:
            found = Infeasible(setup=setup, reason=type(error).__name__, detail=f"{error} (in {unit})")
            self._book.save_infeasible(scope, found)
            raise

    def _kept(self, evidence: Evidence, point: tuple[object, ...]) -> Evidence:
        self.measured_units += 1
        self._counted.add(point)
        return evidence

    def _reused(self, evidence: Evidence, point: tuple[object, ...]) -> Evidence:
        self.reused_units += point not in self._counted
        self._counted.add(point)
        return evidence


def _disturbed(timings: Iterable[Sample | StepTimes]) -> bool:
    return any(timing.disturbed for timing in timings)
