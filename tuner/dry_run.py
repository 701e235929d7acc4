"""What a run would measure and how long that takes: the real decision over predicted evidence.

The decision runs over a copy of the store and an engine that predicts what the copy lacks, so that stored units count
as reused and no prediction is kept. Of each kind of unit that is missing one is run for real, to time it.
"""

import functools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import insert, select

from profiles.engines.base import Engine
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Model, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import (
    Acceptance,
    AcceptanceTrace,
    LookupTrace,
    RoundCount,
    Sample,
    StepShape,
    StepTimes,
    TargetTrace,
)
from store import tables
from store.cached_engine import CachedEngine
from store.database import Location
from store.evidence_store import EvidenceStore
from tuner.pipeline.pipeline import Tuner
from tuner.pipeline.trial import Options
from tuner.search.limits import Limits

# Predictions let drafting win, with other setups in other domains and wide intervals, so that every stage is reached
# and operating points share little: seconds per token or step, and an acceptance rate.
PLAIN_S, STEP_S, DRAFTING_S, ACCEPTANCE_RATE, SPREAD = 0.010, 0.001, 0.006, 0.9, (0.5, 0.8, 1.0, 1.2, 1.5)

Loads = Sequence[tuple[Workload, tuple[Prompt, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Units to measure by stage, units in the store, and seconds for the new ones.

    Races are pruned as the predicted times have it, and proofs end at their first look.
    """

    new_units: Mapping[str, int]
    known_units: int
    seconds: float


def dry_run(engine: Engine, loads: Loads, location: Location, options: Options, since: str = "") -> DryRun:
    """Predicts a run over the store at `location` (an empty one where there is no file yet) without changing it.

    Raises StoreError for a server whose database has no tables yet or older ones: `run` creates them.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        _copy(location, copy, engine.target)
        predicted = DryRunEngine(engine)
        # predicted times must not be checked against real limits
        options = replace(options, limits=Limits(max_memory_gib=options.limits.max_memory_gib))
        with EvidenceStore.open(copy) as evidence_store:
            cached_engine = CachedEngine(predicted, evidence_store, since)
            Tuner(cached_engine, options).tune(loads)
    return DryRun(new_units=dict(predicted.units), known_units=cached_engine.reused_units, seconds=predicted.seconds)


def _copy(location: Location, copy: Path, target: Model) -> None:
    """Copies what is about the target; of a file that is no store an error by its name."""
    if isinstance(location, Path) and not location.exists():
        return
    open_source = EvidenceStore.open if isinstance(location, Path) else EvidenceStore.open_read_only
    with (
        open_source(location) as evidence_store,
        evidence_store.reading() as source,
        EvidenceStore.open(copy) as scratch,
        scratch.writing() as duplicate,
    ):
        for table in tables.metadata.sorted_tables:
            query, about = select(table), table
            owners = [key.column.table for key in table.foreign_keys if "target_key" in key.column.table.c]
            if "target_key" not in table.c and owners:
                query, about = query.join(owners[0]), owners[0]
            if "target_key" in about.c:
                query = query.where(about.c.target_key == target.run_digest)
            rows = [dict(row) for row in source.execute(query).mappings()]
            if rows:
                duplicate.execute(insert(table), rows)
        duplicate.commit()


class DryRunEngine:
    """An `Engine` that predicts evidence and adds up the seconds of real units: the first of each kind is run."""

    def __init__(self, engine: Engine) -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.capabilities = engine.capabilities
        self.drafts = engine.drafts
        self.units: Counter[str] = Counter()
        self.seconds = 0.0
        self._engine = engine
        self._unit_s: dict[tuple[object, ...], float] = {}
        self._samples: dict[Workload, tuple[Prompt, TargetTrace]] = {}
        self._warm: set[tuple[Setup, int]] = set()

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        self._sample(workload, prompt)  # the first run includes one-time work
        self._add("target trace", self._timed((workload,), lambda: self._engine.trace_target(workload, prompt)))
        size = max(2, workload.max_new_tokens)
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(range(size)),
            target_probs=(1.0,) * size,
            logit_gaps=(1.0,) * size,
            ended=False,
        )

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        sample = self._sample(workload, prompt)
        measure = functools.partial(self._engine.trace_draft, workload, *sample, draft, max_length)
        self._add("acceptance", self._timed((workload, draft), measure))
        names, size = {"prompt_digest": prompt.digest, "draft_digest": draft.digest}, len(trace.token_ids)
        if draft.looks_up:
            proposed = (0, *(min(max_length, size - start) for start in range(1, size)))
            return LookupTrace(**names, max_length=max_length, proposed=proposed, accepted=proposed)
        return AcceptanceTrace(**names, accept_probs=(ACCEPTANCE_RATE,) * size, confidences=(ACCEPTANCE_RATE,) * size)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        measure = functools.partial(self._engine.time_steps, workload, context_length, 1)
        widths_s = self._timed((workload, "widths 1 and 2"), measure)  # the drafts' are timed beside them
        self._add("step times", widths_s / 2 * (max_length + 1))
        widths = sorted({*range(1, max_length + 2), *CATCH_UP_WIDTHS})
        step_seconds = {self.target.run_digest: PLAIN_S}
        step_seconds |= {component.digest: STEP_S for draft in self.drafts for component in draft.components}
        return {
            digest: StepTimes(
                component_digest=digest,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s=dict.fromkeys(widths, tuple(step_s * share for share in SPREAD)),
            )
            for digest, step_s in step_seconds.items()
        }

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        batch_size, seconds = workload.batch_size, 0.0
        turns = len(prompts) / batch_size
        for setup in setups:
            warm_up = min(1.0, turns) if (setup, batch_size) not in self._warm else 0.0  # of one batch of prompts
            self._warm.add((setup, batch_size))
            seconds += (turns + warm_up) * self._run_s(workload, prompts[:batch_size], setup)
        self._add(purpose.split(maxsplit=1)[0], seconds)
        size = max(2, workload.max_new_tokens)
        return tuple(_predicted_sample(prompt, setup, size) for setup in setups for prompt in prompts)

    def _sample(self, workload: Workload, prompt: Prompt) -> tuple[Prompt, TargetTrace]:
        """The first prompt that is asked for, with its real trace."""
        if workload not in self._samples:
            self._samples[workload] = prompt, self._engine.trace_target(workload, prompt)
        return self._samples[workload]

    def _run_s(self, workload: Workload, prompts: tuple[Prompt, ...], setup: Setup) -> float:
        """Seconds of a run of a setup's draft, at the first length that is asked for."""
        unit = (workload.batch_size, setup.draft)
        if unit not in self._unit_s:
            runs = self._engine.run_together(workload, prompts, (setup,), "dry run")
            self._unit_s[unit] = sum(run.ttft_s + run.decode_s for run in runs) / len(runs)
        return self._unit_s[unit]

    def _timed(self, unit: tuple[object, ...], measure: Callable[[], object]) -> float:
        """Seconds of a kind of unit, run when the first is asked for."""
        if unit not in self._unit_s:
            started_s = time.perf_counter()
            measure()
            self._unit_s[unit] = time.perf_counter() - started_s
        return self._unit_s[unit]

    def _add(self, stage: str, seconds: float) -> None:
        self.units[stage] += 1
        self.seconds += seconds


def _predicted_sample(prompt: Prompt, setup: Setup, size: int) -> Sample:
    """A run of `size` tokens; speed varies by setup and domain, and a little by prompt."""
    factor = random.Random(f"{prompt.domain} {setup.digest}").uniform(0.9, 1.1)
    token_s = PLAIN_S if setup == PLAIN else DRAFTING_S * factor
    rng = random.Random(f"{prompt.digest} {setup.digest}")
    with_model = setup.draft is not None and setup.draft.kind != "ngram"
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=PLAIN_S,
        decode_s=(size - 1) * token_s * rng.uniform(0.99, 1.01),
        output_tokens=size,
        rounds={RoundCount(setup.length, 0): size - 1},
        shapes={StepShape(setup.length + 1, *((setup.length, 2) if with_model else ())): size - 1},
        output_digest=digest_of(size),
    )
