"""What a run would measure and how long that takes: the real decision over predicted evidence.

The decision runs over a copy of the store and an engine that predicts what the copy lacks, so that stored units count
as reused and no prediction is kept. Only a few prompts are run for real, in a scratch store, to time each kind of unit.
"""

import contextlib
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from tuner.pipeline.pipeline import Tuner
from tuner.pipeline.trial import Options
from tuner.search.limits import Limits

SAMPLE_PROMPTS = 3
# Predictions let drafting win, with other setups in other domains and wide intervals, so that every stage is reached
# and operating points share little: seconds per token or step, and an acceptance rate.
PLAIN_S, STEP_S, DRAFTING_S, ACCEPTANCE_RATE, SPREAD = 0.010, 0.001, 0.006, 0.9, (0.5, 0.8, 1.0, 1.2, 1.5)

Loads = Sequence[tuple[Workload, tuple[Prompt, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSeconds:
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
    """Units to measure by stage, units in the store, and seconds for the new ones.

    No race is pruned, and proofs end at their first look.
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
        with EvidenceStore.open(Path(folder) / "scratch.db") as scratch:
            first = {workload.batch_size: (workload, prompts) for workload, prompts in reversed(loads)}
            sampled, longest = CachedEngine(engine, scratch), max(options.lengths)
            predicted = DryRunEngine(engine, {size: time_units(sampled, load, longest) for size, load in first.items()})
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


def time_units(engine: CachedEngine, load: tuple[Workload, tuple[Prompt, ...]], max_length: int) -> UnitSeconds:
    """Times a few units of each kind for real; a draft that fails is left out."""
    workload, prompts = load
    chosen = spread_over_domains(prompts, SAMPLE_PROMPTS + 1)
    engine.trace_target(workload, chosen[-1])  # the first run includes one-time work
    chosen = chosen[:SAMPLE_PROMPTS]
    started = engine.measured_seconds
    traces = [engine.trace_target(workload, prompt) for prompt in chosen]
    trace_s = (engine.measured_seconds - started) / len(chosen)
    started = engine.measured_seconds
    engine.time_steps(workload, typical_context(workload, chosen), 1)
    widths_s = (engine.measured_seconds - started) / 2  # of the target's two widths; the drafts' are timed beside them
    acceptance_s: dict[Draft, float] = {}
    traced = {draft: draft.components if engine.capabilities.traces(draft) else () for draft in engine.drafts}
    for component in dict.fromkeys(itertools.chain.from_iterable(traced.values())):
        with contextlib.suppress(EngineError):
            started = engine.measured_seconds
            engine.trace_draft(workload, chosen[0], traces[0], component, max_length)
            acceptance_s[component] = engine.measured_seconds - started

    def mean_run_s(setup: Setup) -> float:
        sample_queues = queues(chosen, workload.batch_size, max_alone=len(chosen), num_queues=1, batches_per_queue=1)
        runs = [run for queue in sample_queues for run in engine.run_together(workload, queue, (setup,), "dry run")]
        return sum(run.ttft_s + run.decode_s for run in runs) / len(runs)

    run_s: dict[Draft | None, float] = {None: mean_run_s(PLAIN)}
    for draft in engine.drafts:
        middle = _middle_length(engine.capabilities, draft, max_length)
        if middle is None or not acceptance_s.keys() >= set(traced[draft]):
            continue
        with contextlib.suppress(EngineError):
            run_s[draft] = mean_run_s(middle)
    tokens = sum(len(trace.token_ids) for trace in traces) // len(traces)
    trace_s = max(trace_s, run_s[None])  # with few prompts the warm-up has traced them already
    return UnitSeconds(trace_s=trace_s, acceptance_s=acceptance_s, run_s=run_s, widths_s=widths_s, output_tokens=tokens)


def _middle_length(capabilities: EngineCapabilities, draft: Draft, max_length: int) -> Setup | None:
    """The draft at the middle of the lengths that the engine can draft; None where there is none."""
    setups = (Setup(draft=draft, length=length) for length in range(1, max_length + 1))
    drafting = [setup for setup in setups if capabilities.drafts_with(setup)]
    return drafting[(len(drafting) - 1) // 2] if drafting else None


class DryRunEngine:
    """An `Engine` that answers at once with predicted evidence and adds up the seconds of the real units."""

    def __init__(self, engine: Engine, unit_seconds: Mapping[int, UnitSeconds]) -> None:
        self.environment = engine.environment
        self.target = engine.target
        self.capabilities = engine.capabilities
        self.drafts = tuple(
            draft for draft in engine.drafts if all(draft in cost.run_s for cost in unit_seconds.values())
        )
        self.units: Counter[str] = Counter()
        self.seconds = 0.0
        self._unit_seconds = unit_seconds
        self._warm: set[tuple[Setup, int]] = set()

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        cost = self._unit_seconds[workload.batch_size]
        self._count("target trace", cost.trace_s)
        size = max(2, min(cost.output_tokens, workload.max_new_tokens))
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
        self._count("acceptance", self._unit_seconds[workload.batch_size].acceptance_s[draft])
        names, size = {"prompt_digest": prompt.digest, "draft_digest": draft.digest}, len(trace.token_ids)
        if draft.looks_up:
            proposed = (0, *(min(max_length, size - start) for start in range(1, size)))
            return LookupTrace(**names, max_length=max_length, proposed=proposed, accepted=proposed)
        return AcceptanceTrace(**names, accept_probs=(ACCEPTANCE_RATE,) * size, confidences=(ACCEPTANCE_RATE,) * size)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        self._count("step times", self._unit_seconds[workload.batch_size].widths_s * (max_length + 1))
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
        cost, size = self._unit_seconds[workload.batch_size], workload.batch_size
        warm_up = {(setup, size) for setup in setups} - self._warm
        self._warm |= warm_up
        turns = len(prompts) / size
        seconds = sum(turns * cost.run_s[setup.draft] for setup in setups)
        seconds += sum(min(1.0, turns) * cost.run_s[setup.draft] for setup, _ in warm_up)  # of one batch of prompts
        self._count(purpose.split(maxsplit=1)[0], seconds)
        size = max(2, min(cost.output_tokens, workload.max_new_tokens))
        return tuple(_predicted_sample(prompt, setup, size) for setup in setups for prompt in prompts)

    def _count(self, stage: str, seconds: float) -> None:
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
