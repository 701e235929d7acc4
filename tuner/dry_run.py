"""What a run would measure and how long that would take, before it measures: the real decision over made-up answers.

The decision runs over a copy of the book and an engine that imagines whatever the copy lacks, so that known units
count as known and nothing imagined is ever kept. Only a glance at a few prompts is really run, for the pace, in a
scratch book.
"""

import contextlib
import random
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import insert, select

from profiles.engines.base import Engine, EngineCapabilities
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Model, Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError
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
from tuner.forecast.evidence import typical_context
from tuner.forecast.queues import queues, spread_over_domains
from tuner.pipeline.pipeline import Options, Tuner
from tuner.search.limits import Limits

if TYPE_CHECKING:
    from rich.table import Table

GLANCE_PROMPTS = 3
# What is imagined lets drafting win, by other setups in other domains and with wide intervals, so that every stage is
# reached and little is shared between anchors: seconds per token or step, and shares kept.
PLAIN_S, STEP_S, DRAFTING_S, KEPT, SPREAD = 0.010, 0.001, 0.006, 0.9, (0.5, 0.8, 1.0, 1.2, 1.5)

Loads = Sequence[tuple[Workload, tuple[Prompt, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of one unit of each kind on this machine, and tokens of a typical output.

    `run_s` is a whole run of plain decoding (None) or of a draft at a middle length; `widths_s` one sweep of step
    times per width of the target.
    """

    trace_s: float
    acceptance_s: Mapping[Draft, float]
    run_s: Mapping[Draft | None, float]
    widths_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Units to measure by stage, units already known, and the seconds the new ones take, pruned races not foreseen."""

    new_units: Mapping[str, int]
    known_units: int
    seconds: float


def dry_run(engine: Engine, loads: Loads, location: Location, options: Options, since: str = "") -> DryRun:
    """Rehearses a run over the book at `location`, or an empty one where there is no file yet, without changing it.

    Raises StoreError for a server whose database has no tables yet or older ones: a run makes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        _copy(location, copy, engine.target)
        with EvidenceStore.open(Path(folder) / "glance.db") as scratch:
            first = {workload.batch_size: (workload, prompts) for workload, prompts in reversed(loads)}
            glancing, longest = CachedEngine(engine, scratch), max(options.lengths)
            imagined = DryRunEngine(engine, {size: glance(glancing, load, longest) for size, load in first.items()})
        # imagined times must not be held to real limits
        options = replace(options, limits=Limits(max_memory_gib=options.limits.max_memory_gib))
        with EvidenceStore.open(copy) as evidence_store:
            cached_engine = CachedEngine(imagined, evidence_store, since)
            Tuner(cached_engine, options).tune(loads)
    return DryRun(new_units=dict(imagined.units), known_units=cached_engine.reused_units, seconds=imagined.seconds)


def _copy(location: Location, copy: Path, target: Model) -> None:
    """A file as a whole; of a server's store what is about the target."""
    if isinstance(location, Path):
        if location.exists():
            EvidenceStore.open(location).close()  # refuses what is no book, under its own name
            with (
                contextlib.closing(sqlite3.connect(location)) as source,
                contextlib.closing(sqlite3.connect(copy)) as twin,
            ):
                source.backup(twin)
        return
    with (
        EvidenceStore.open_read_only(location) as evidence_store,
        evidence_store.reading() as source,
        EvidenceStore.open(copy) as scratch,
        scratch.writing() as twin,
    ):
        for table in tables.metadata.sorted_tables:
            query = select(table)
            if "target_key" in table.c:
                query = query.where(table.c.target_key == target.run_digest)
            rows = [dict(row) for row in source.execute(query).mappings()]
            if rows:
                twin.execute(insert(table), rows)
        twin.commit()


def units_table(found: DryRun) -> "Table":
    """How many units of each stage would be measured."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("stage", "units to measure", box=SIMPLE_HEAD)
    for stage, count in found.new_units.items():
        table.add_row(stage, str(count))
    return table


def glance(engine: CachedEngine, load: tuple[Workload, tuple[Prompt, ...]], max_length: int) -> Pace:
    """Times a few units of each kind for real; a draft that fails is left out."""
    workload, prompts = load
    chosen = spread_over_domains(prompts, GLANCE_PROMPTS + 1)
    engine.trace_target(workload, chosen[-1])  # the first run pays for what is set up once
    chosen = chosen[:GLANCE_PROMPTS]
    started = engine.measured_seconds
    traces = [engine.trace_target(workload, prompt) for prompt in chosen]
    trace_s = (engine.measured_seconds - started) / len(chosen)
    started = engine.measured_seconds
    engine.time_steps(workload, typical_context(workload, chosen), 1)
    widths_s = (engine.measured_seconds - started) / 2  # of the target's two widths; the drafts' are timed beside them
    acceptance_s: dict[Draft, float] = {}
    traced = {draft: draft.components if engine.capabilities.traces(draft) else () for draft in engine.drafts}
    for part in dict.fromkeys(part for parts in traced.values() for part in parts):
        with contextlib.suppress(EngineError):
            started = engine.measured_seconds
            engine.trace_draft(workload, chosen[0], traces[0], part, max_length)
            acceptance_s[part] = engine.measured_seconds - started

    def mean_run_s(setup: Setup) -> float:
        glances = queues(chosen, workload.batch_size, max_alone=len(chosen), num_queues=1, batches_per_queue=1)
        runs = [run for queue in glances for run in engine.run_together(workload, queue, (setup,), "glance")]
        return sum(run.ttft_s + run.decode_s for run in runs) / len(runs)

    run_s: dict[Draft | None, float] = {None: mean_run_s(PLAIN)}
    for draft in engine.drafts:
        middle = _middle(engine.capabilities, draft, max_length)
        if middle is None or not acceptance_s.keys() >= set(traced[draft]):
            continue
        with contextlib.suppress(EngineError):
            run_s[draft] = mean_run_s(middle)
    tokens = sum(len(trace.token_ids) for trace in traces) // len(traces)
    trace_s = max(trace_s, run_s[None])  # with few prompts the traces were known from the warm-up
    return Pace(trace_s=trace_s, acceptance_s=acceptance_s, run_s=run_s, widths_s=widths_s, output_tokens=tokens)


def _middle(properties: EngineCapabilities, draft: Draft, max_length: int) -> Setup | None:
    """The draft at a middle one of the lengths at which it drafts; None where it does so at none."""
    asked = (Setup(draft=draft, length=length) for length in range(1, max_length + 1))
    drafting = [setup for setup in asked if properties.drafts_with(setup)]
    return drafting[(len(drafting) - 1) // 2] if drafting else None


class DryRunEngine:
    """Fits `Engine`: answers at once with made-up evidence, and adds up what the real units would take."""

    def __init__(self, engine: Engine, paces: Mapping[int, Pace]) -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.capabilities = engine.capabilities
        self.drafts = tuple(draft for draft in engine.drafts if all(draft in pace.run_s for pace in paces.values()))
        self.units: Counter[str] = Counter()
        self.seconds = 0.0
        self._paces = paces
        self._warm: set[tuple[Setup, int]] = set()

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        pace = self._paces[workload.batch_size]
        self._count("target trace", pace.trace_s)
        size = max(2, min(pace.output_tokens, workload.max_new_tokens))
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(range(size)),
            target_probs=(1.0,) * size,
            logit_gaps=(1.0,) * size,
            ended=False,
        )

    def trace_draft(
        self,
        workload: Workload,
        prompt: Prompt,
        trace: TargetTrace,
        draft: Draft,
        max_length: int,
    ) -> Acceptance:
        self._count("acceptance", self._paces[workload.batch_size].acceptance_s[draft])
        names, size = {"prompt_digest": prompt.digest, "draft_digest": draft.digest}, len(trace.token_ids)
        if draft.looks_up:
            proposed = (0, *(min(max_length, size - start) for start in range(1, size)))
            return LookupTrace(**names, max_length=max_length, proposed=proposed, accepted=proposed)
        return AcceptanceTrace(**names, accept_probs=(KEPT,) * size, confidences=(KEPT,) * size)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        self._count("step times", self._paces[workload.batch_size].widths_s * (max_length + 1))
        widths = sorted({*range(1, max_length + 2), *CATCH_UP_WIDTHS})
        parts = {self.target.run_digest: PLAIN_S}
        parts |= {part.digest: STEP_S for draft in self.drafts for part in draft.components}
        return {
            part: StepTimes(
                component_digest=part,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s=dict.fromkeys(widths, tuple(step_s * share for share in SPREAD)),
            )
            for part, step_s in parts.items()
        }

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        pace, size = self._paces[workload.batch_size], workload.batch_size
        warm_up = {(setup, size) for setup in setups} - self._warm
        self._warm |= warm_up
        turns = len(prompts) / size
        seconds = sum(turns * pace.run_s[setup.draft] for setup in setups)
        seconds += sum(min(1.0, turns) * pace.run_s[setup.draft] for setup, _ in warm_up)  # of one batch of prompts
        self._count(purpose.split(maxsplit=1)[0], seconds)
        size = max(2, min(pace.output_tokens, workload.max_new_tokens))
        return tuple(_predicted_sample(prompt, setup, size) for setup in setups for prompt in prompts)

    def _count(self, stage: str, seconds: float) -> None:
        self.units[stage] += 1
        self.seconds += seconds


def _predicted_sample(prompt: Prompt, setup: Setup, size: int) -> Sample:
    """A run of `size` tokens: a setup is as fast as its domain lets it, a little different for every prompt."""
    luck = random.Random(f"{prompt.domain} {setup.digest}").uniform(0.9, 1.1)
    pace_s = PLAIN_S if setup == PLAIN else DRAFTING_S * luck
    rng = random.Random(f"{prompt.digest} {setup.digest}")
    with_model = setup.draft is not None and setup.draft.kind != "ngram"
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=PLAIN_S,
        decode_s=(size - 1) * pace_s * rng.uniform(0.99, 1.01),
        output_tokens=size,
        rounds={RoundCount(setup.length, 0): size - 1},
        shapes={StepShape(setup.length + 1, *((setup.length, 2) if with_model else ())): size - 1},
        output_digest=digest_of(size),
    )
