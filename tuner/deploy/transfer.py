"""A forecast for a machine on which nothing was run: acceptance from one machine, step times from another like it.

Acceptance belongs to the models and the text, so it holds anywhere; only the staircases must be of the machine, or of
one of its family. What comes out was not measured and is never called proven. It loads no torch.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from profiles.engines.recorded import is_of_rounds
from profiles.hardware.device import Machine, drop_unknown
from profiles.records.codec import draft_from, workload_from
from profiles.records.core import PLAIN, Draft, Model, Setup, Workload
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Acceptance, LookupTrace, Sample, StepTimes
from profiles.stats import median
from store import tables
from store.evidence_store import EvidenceStore
from tuner.deploy.match import LEVELS, Level, match
from tuner.forecast.cost_model import StepCostModel, Steps, step_samples
from tuner.forecast.evidence import Evidence
from tuner.forecast.forecaster import Forecaster
from tuner.policy.estimates import Forecast
from tuner.policy.policy import Choice
from tuner.policy.query import match_temperature
from tuner.search.objective import candidates, score

NEAR = LEVELS[: LEVELS.index("family") + 1]
MOST_STRETCH = 4
MAX_PROMPTS, FEWEST_PROMPTS = 16, 12
CALIBRATION = "calibration "


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """The best drafting setup by a transferred forecast; there is none where no draft's interval lies above 1.

    `level` says how well the machine fits whose step times were taken, `step_times_from` which it was, `cached_tokens`
    at how many. `overhead_from` is the machine on which rounds were really run, whose time beyond the steps was scaled
    by the ratio of the targets' single-token steps; None: it is not known and counted as 0. `law`: temperature, top-p
    and top-k of the acceptance; `context_length` is the longest it was seen at.
    """

    forecast: Forecast
    level: Level
    step_times_from: str
    overhead_from: str | None
    batch_size: int
    context_length: int
    cached_tokens: int
    num_prompts: int
    law: tuple[float, float, int]

    @property
    def setup(self) -> Setup:
        return self.forecast.setup

    @property
    def rule(self) -> str:
        """What it holds for, as an answer says it."""
        return f"forecast from step times at batch {self.batch_size}, {self.cached_tokens} tokens cached"

    @property
    def reason(self) -> str:
        """One sentence: what is forecast, and that nothing of it was measured here."""
        speedup, lent_by = self.forecast.speedup, self.overhead_from
        beyond = f"what rounds take beyond steps on {lent_by}" if lent_by else "no time beyond the steps"
        return (
            f"A transferred forecast, not measured here: {self.setup.name} at {speedup.estimate:.2f} "
            f"[{speedup.low:.2f}, {speedup.high:.2f}] times plain decoding at batch {self.batch_size}, from acceptance "
            f"on {self.num_prompts} prompts of all domains, step times of {self.step_times_from} with "
            f"{self.cached_tokens} tokens cached, and {beyond}."
        )

    def choice(self, domain: str) -> Choice:
        """The setup as a choice that nothing was measured of."""
        temperature, top_p, top_k = self.law
        return Choice(
            batch_size=self.batch_size,
            context_length=self.context_length,
            domain=domain,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            setup=self.setup,
            reason=self.reason,
            forecast=self.forecast,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A prompt of which only the digest is known: the store keeps no text."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    """Staircases measured together on one machine, and how well that machine fits."""

    machine: Machine
    environment_digest: str
    level: Level
    steps: Mapping[str, StepTimes]
    max_length: int

    @property
    def batch_size(self) -> int:
        return next(iter(self.steps.values())).batch_size

    @property
    def cached_tokens(self) -> int:
        return next(iter(self.steps.values())).context_length

    @property
    def disturbed(self) -> bool:
        return any(times.disturbed for times in self.steps.values())

    def order(self, batch_size: int, num_tokens: float | None) -> tuple[float, ...]:
        """The better one first for so many rows and cached tokens (None: the longest)."""
        away = -self.cached_tokens if num_tokens is None else _away(self.cached_tokens, num_tokens)
        return LEVELS.index(self.level), self.batch_size - batch_size, away, self.disturbed


def transfer(
    evidence_store: EvidenceStore,
    target: Model,
    here: Machine,
    shape: tuple[int, int | None],
    temperature: float | None,
) -> Transferred | None:
    """The forecast for `here`, None where acceptance or step times of the target are missing or no draft pays.

    `shape` is (batch, context; None: not known). Step times are those of the machine that fits best, at worst one of
    the same family with the same engine, at the smallest measured batch that is at least as large and with the nearest
    number of cached tokens, at most four times fewer than the context. Acceptance is that of the latest run at
    `temperature` (None: any) whose context was at least as long.
    """
    batch_size, context_length = shape
    with evidence_store.reading() as connection:
        sweeps = list(_sweeps(connection, target, here))
        fitting = [sweep for sweep in sweeps if sweep.level in NEAR and sweep.batch_size >= batch_size]
        fitting = [sweep for sweep in fitting if MOST_STRETCH * sweep.cached_tokens >= (context_length or 0)]
        fitting.sort(key=lambda sweep: sweep.order(batch_size, context_length))
        runs = list(_runs(connection, target, temperature))
        for sweep, (asked, drafts) in itertools.product(fitting, runs):
            if asked.context_length < (context_length or 0):
                continue
            workload = replace(asked, batch_size=sweep.batch_size)
            evidence = _evidence(connection, target, workload, (drafts, sweep))
            if evidence.drafts:
                lender = _lend_calibration(connection, target, workload, (evidence, sweep), sweeps)
                calibration, lent_by = lender or ((), None)
                return _best(target, workload, replace(evidence, calibration=calibration), (sweep, lent_by))
    return None


def _best(
    target: Model, workload: Workload, evidence: Evidence, source: tuple[_Sweep, str | None]
) -> Transferred | None:
    sweep, lent_by = source
    if all(len(trace.token_ids) < 2 for trace in evidence.traces.values()):
        return None  # there is no time per token
    prompts = [_Prompt(digest=digest) for digest in evidence.traces]
    forecaster = Forecaster(evidence, workload, target.run_digest)
    longest = _longest_lengths(evidence, sweep)
    setups = [setup for draft in evidence.drafts for setup in candidates([draft], range(1, longest[draft] + 1))]
    best = max((forecaster.forecast(setup, prompts) for setup in setups), key=score)
    if best.setup == PLAIN or score(best) <= 1.0:
        return None
    return Transferred(
        forecast=best,
        level=sweep.level,
        step_times_from=str(sweep.machine["device"]),
        overhead_from=lent_by,
        batch_size=sweep.batch_size,
        context_length=workload.context_length,
        cached_tokens=sweep.cached_tokens,
        num_prompts=len(prompts),
        law=(workload.temperature, workload.top_p, workload.top_k),
    )


def _longest_lengths(evidence: Evidence, sweep: _Sweep) -> dict[Draft, int]:
    """The longest speculation length each draft can be forecast at: as long as it was timed and, a look-up, traced."""
    longest = {}
    for draft in evidence.drafts:
        traced = [
            acceptance.max_length
            for (part, _), acceptance in evidence.acceptances.items()
            if isinstance(acceptance, LookupTrace) and part in {own.digest for own in draft.components}
        ]
        longest[draft] = min([sweep.max_length, *traced])
    return longest


def _away(one: float, other: float) -> float:
    return abs(math.log(one) - math.log(other))


def _rows(connection: Connection, query: Select[Any]) -> Iterator[tables.Row]:
    return (dict(row) for row in connection.execute(query).mappings())


def _sweeps(connection: Connection, target: Model, here: Machine) -> Iterator[_Sweep]:
    """Every sweep of the target by the same engine, newest first."""
    query = select(tables.step_times).filter_by(target_key=target.run_digest).order_by(tables.step_times.c.id.desc())
    parts: dict[str, list[tables.Row]] = {}
    for row in _rows(connection, query):
        parts.setdefault(row["sweep"], []).append(row)
    timed = tables.environments.c.digest.in_({rows[0]["environment_digest"] for rows in parts.values()})
    machines = {row["digest"]: drop_unknown(row) for row in _rows(connection, select(tables.environments).where(timed))}
    for rows in parts.values():
        machine = machines[rows[0]["environment_digest"]]
        if machine["engine"] != here.get("engine"):
            continue
        records = [tables.sweep_record(row) for row in rows]  # type: ignore
        steps = {times.component_digest: times for _, _, times in records}
        if is_of_rounds(steps, target):
            continue  # of an engine that is not ours: rounds are not made of steps that another machine could lend
        yield _Sweep(
            machine=machine,
            environment_digest=rows[0]["environment_digest"],
            level=match(here, machine).level,
            steps=steps,
            max_length=min(max_length for _, max_length, _ in records),
        )


def _runs(
    connection: Connection, target: Model, temperature: float | None
) -> Iterator[tuple[Workload, tuple[Draft, ...]]]:
    """Workloads of finished runs and the drafts that were tried, newest first; others are passed over."""
    runs = tables.runs.c
    query = select(runs.workload, runs.outcome).where(runs.target_key == target.run_digest)
    for raw, outcome in connection.execute(query.order_by(runs.started_at.desc(), runs.id.desc())):
        try:
            workload = workload_from(raw)
            drafts = tuple(draft_from(draft) for draft in outcome["dossier"]["drafts"])
        except (LookupError, TypeError, ValueError):
            continue
        if temperature is None or match_temperature({workload.temperature}, temperature) is not None:
            yield workload, drafts


def _evidence(
    connection: Connection, target: Model, workload: Workload, given: tuple[tuple[Draft, ...], _Sweep]
) -> Evidence:
    """The drafts whose parts were all timed in the sweep, with at most 16 prompts on which all of these were traced.

    A draft that was traced on no prompt of the others' is left out, the one with the fewest prompts first.
    """
    drafts, sweep = given
    about = {"target_key": target.run_digest, "sampling_digest": workload.sampling_digest}
    traced = _traced(connection, about)
    usable = [draft for draft in drafts if all(part.digest in sweep.steps for part in draft.components)]
    prompts_of = {draft: set.intersection(*(traced[part.digest] for part in draft.components)) for draft in usable}
    usable = sorted((draft for draft in usable if prompts_of[draft]), key=lambda draft: -len(prompts_of[draft]))
    shared: set[str] = set()
    kept: list[Draft] = []
    for draft in usable:
        both = shared & prompts_of[draft] if kept else prompts_of[draft]
        if len(both) >= min(FEWEST_PROMPTS, len(shared) or FEWEST_PROMPTS) or not kept:
            shared, kept = both, [*kept, draft]
    prompts = sorted(shared)[:MAX_PROMPTS]
    parts = {part.digest for draft in kept for part in draft.components}
    return Evidence(
        prompts=(),
        traces={
            row["prompt_digest"]: tables.target_trace_record(row)
            for row in _about(connection, tables.target_traces, about, prompts)
        },
        acceptances=_acceptances(connection, about, prompts, parts),
        steps=dict(sweep.steps),
        calibration=(),
        drafts=tuple(draft for draft in drafts if draft in kept),
        infeasible=(),
    )


def _traced(connection: Connection, about: Mapping[str, str]) -> defaultdict[str, set[str]]:
    """The prompts on which each part of a draft was traced."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for table in (tables.acceptance_traces, tables.lookup_traces):
        query = select(table.c.draft_digest, table.c.prompt_digest).filter_by(**about)
        for part, prompt in connection.execute(query):
            found[part].add(prompt)
    return found


def _acceptances(
    connection: Connection, about: Mapping[str, str], prompts: Sequence[str], parts: set[str]
) -> dict[tuple[str, str], Acceptance]:
    """Of look-ups the longest trace, of which shorter ones are prefixes."""
    found: dict[tuple[str, str], Acceptance] = {}
    for row in _about(connection, tables.acceptance_traces, about, prompts):
        if row["draft_digest"] in parts:
            found[row["draft_digest"], row["prompt_digest"]] = tables.acceptance_record(row)
    for row in _about(connection, tables.lookup_traces, about, prompts):
        if row["draft_digest"] in parts:
            one, key = tables.lookup_record(row), (row["draft_digest"], row["prompt_digest"])
            known_one = found.get(key)
            if not isinstance(known_one, LookupTrace) or known_one.max_length < one.max_length:
                found[key] = one
    return found


def _about(
    connection: Connection, table: Table, about: Mapping[str, str], prompts: Sequence[str]
) -> Iterator[tables.Row]:
    return _rows(connection, select(table).filter_by(**about).where(table.c.prompt_digest.in_(prompts)))


def _lend_calibration(
    connection: Connection,
    target: Model,
    workload: Workload,
    lacking: tuple[Evidence, _Sweep],
    sweeps: Sequence[_Sweep],
) -> tuple[tuple[tuple[Setup, Sample], ...], str] | None:
    """Calibration runs of the machine that fits best, their seconds as they would be here, and that machine's name.

    Its own steps are taken with the number of cached tokens that is nearest to those of the sweep, at most twice as
    many or as few: what is beyond steps of another context is no overhead.
    """
    evidence, here = lacking
    longest = max(sweep.max_length for sweep in sweeps)
    setups = {setup.digest: setup for setup in candidates(evidence.drafts, range(1, longest + 1))}
    near = [
        sweep
        for sweep in sweeps
        if sweep.batch_size == here.batch_size and _away(sweep.cached_tokens, here.cached_tokens) <= math.log(2.0)
    ]
    for sweep in sorted(near, key=lambda one: one.order(here.batch_size, here.cached_tokens)):
        runs = tables.samples.c
        about = {"target_key": target.run_digest, "environment_digest": sweep.environment_digest}
        query = select(tables.samples).filter_by(**about, timing_digest=workload.timing_digest)
        query = query.where(
            runs.purpose.startswith(CALIBRATION), runs.disturbed.is_(False), runs.setup_digest.in_(setups)
        )
        samples = [(setups[row["setup_digest"]], tables.sample_record(row)) for row in _rows(connection, query)]
        lent = list(_moved(samples, sweep.steps, evidence.steps, target.run_digest))
        if any(setup == PLAIN for setup, _ in lent):
            return tuple(lent), str(sweep.machine["device"])
    return None


def _moved(
    samples: Sequence[tuple[Setup, Sample]], there: Steps, here: Steps, target_part: str
) -> Iterator[tuple[Setup, Sample]]:
    """Runs with their steps priced here; what they took beyond the steps scales with the target's single-token step."""
    for setup, sample in samples:
        try:
            scale = median(step_samples(here, target_part, 1)) / median(step_samples(there, target_part, 1))
            used = StepCostModel(target_part).usage(setup, sample.shapes, sample.refills).steps
            stepped_there, stepped_here = (
                sum(count * median(step_samples(steps, *step)) for step, count in used.items())
                for steps in (there, here)
            )
        except NotMeasuredError:
            continue
        decode_s = max(0.0, stepped_here + (sample.decode_s - stepped_there) * scale)
        yield setup, replace(sample, decode_s=decode_s, ttft_s=sample.ttft_s * scale)
