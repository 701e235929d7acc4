"""An engine that remembers: it looks in the book first, and saves at once what the wrapped engine had to measure.

An interrupted run resumes where it stopped, and a second run pays only for what is new. It must not know how the
wrapped engine measures, nor why it is asked.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from profiles.errors import EngineError
from profiles.terms import (
    PLAIN,
    Acceptance,
    Draft,
    Engine,
    Environment,
    Infeasible,
    Model,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
)
from store.book import Book, Scope

Evidence = TypeVar("Evidence")


class Remember:
    """Fits `Engine`. An `EngineError` is kept as an `Infeasible` row, never as a number, and raised again.

    `listener` hears of every unit: a short description and whether it was reused. `measured_seconds` is the time
    spent in the wrapped engine, failures included.
    """

    def __init__(self, engine: Engine, book: Book) -> None:
        self._engine = engine
        self._book = book
        self.listener: Callable[[str, bool], None] | None = None
        self.measured_units = 0
        self.measured_seconds = 0.0
        self.reused_by_kind: Counter[str] = Counter()

    @property
    def reused_units(self) -> int:
        return self.reused_by_kind.total()

    @property
    def environment(self) -> Environment:
        return self._engine.environment

    @property
    def target(self) -> Model:
        return self._engine.target

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return self._engine.drafts

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        scope = self._scope(workload)
        unit = f"target trace, {prompt.domain}"
        found = self._book.find_target_trace(scope, prompt)
        if found is not None:
            return self._reused("target traces", unit, found)
        trace = self._measured(scope, PLAIN, unit, lambda: self._engine.trace_target(workload, prompt))
        self._book.save_target_trace(scope, prompt, trace)
        return self._told(unit, trace)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        scope = self._scope(workload)
        unit = f"acceptance of {draft.name}, {prompt.domain}"
        found = self._book.find_acceptance(scope, prompt, draft, max_length)
        if found is not None:
            return self._reused("acceptance", unit, found)
        setup = Setup(draft=draft, length=max_length)
        acceptance = self._measured(
            scope, setup, unit, lambda: self._engine.trace_draft(workload, prompt, trace, draft, max_length)
        )
        self._book.save_acceptance(scope, prompt, draft, acceptance)
        return self._told(unit, acceptance)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        scope = self._scope(workload)
        unit = f"step times at batch {workload.batch_size}, context {context_length}"
        found = self._book.find_step_times(scope, self.drafts, context_length, max_length)
        if found is not None:
            return self._reused("step times", unit, found)
        times = self._measured(
            scope, PLAIN, unit, lambda: self._engine.time_steps(workload, context_length, max_length)
        )
        self._book.save_step_times(scope, self.drafts, max_length, times)
        return self._told(unit, times)

    def run_together(
        self, workload: Workload, prompt: Prompt, setups: tuple[Setup, ...], occasion: str
    ) -> tuple[Sample, ...]:
        scope = self._scope(workload)
        unit = f"{occasion}: {', '.join(setup.name for setup in setups)}, {prompt.domain}"
        found = self._book.find_samples(scope, prompt, setups, occasion)
        if found is not None:
            return self._reused("samples", unit, found)
        drafting = [setup for setup in dict.fromkeys(setups) if setup != PLAIN]
        suspect = drafting[0] if len(drafting) == 1 else PLAIN
        samples = self._measured(
            scope, suspect, unit, lambda: self._engine.run_together(workload, prompt, setups, occasion)
        )
        self._book.save_samples(scope, prompt, setups, occasion, samples)
        return self._told(unit, samples)

    def _scope(self, workload: Workload) -> Scope:
        return Scope(target=self.target, environment=self.environment, workload=workload)

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

    def _told(self, unit: str, evidence: Evidence) -> Evidence:
        self.measured_units += 1
        if self.listener is not None:
            self.listener(unit, False)
        return evidence

    def _reused(self, kind: str, unit: str, evidence: Evidence) -> Evidence:
        self.reused_by_kind[kind] += 1
        if self.listener is not None:
            self.listener(unit, True)
        return evidence
