"""A forecast for a machine on which nothing was run: acceptance from one machine, step times from another like it.

Acceptance belongs to the models and the text, so it holds anywhere; only the staircases must be of the machine, or of
one of its family. What comes out was not measured and is never called proven. It loads no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Select, select

from profiles.errors import NotMeasuredError
from profiles.formulas import median
from profiles.recorded import draft_from, workload_from
from profiles.terms import PLAIN, Acceptance, Draft, LookupTrace, Model, Sample, Setup, StepTimes, Workload
from profiles.traits import Machine, known
from store import tables
from store.book import Book
from tuner.claims import Forecast
from tuner.evidence import Evidence
from tuner.forecast import Forecaster
from tuner.match import LEVELS, Level, match
from tuner.objective import score
from tuner.overhead import Steps, step_samples, use_of
from tuner.policy import match_temperature
from tuner.space import candidates

WORST = LEVELS.index("family")
MAX_PROMPTS = 32
CALIBRATION = "calibration "


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """The best setup by a transferred forecast, plain decoding where no draft's interval lies above 1.

    `level` says how well the machine fits whose step times were taken, `step_times_from` which it was. `overhead_from`
    is the machine on which rounds were really run, whose time beyond the steps was scaled by the ratio of the targets'
    single-token steps; None: it is not known and counted as 0. `context_length` is that of the step times.
    """

    setup: Setup
    forecast: Forecast
    level: Level
    step_times_from: str
    overhead_from: str | None
    batch_size: int
    context_length: int
    num_prompts: int

    @property
    def reason(self) -> str:
        """One sentence: what is forecast, and that nothing of it was measured here."""
        speedup, lent_by = self.forecast.speedup, self.overhead_from
        beyond = f"what rounds take beyond steps on {lent_by}" if lent_by else "no time beyond the steps"
        return (
            f"A transferred forecast, not measured here: {self.setup.name} at {speedup.estimate:.2f} "
            f"[{speedup.low:.2f}, {speedup.high:.2f}] times plain decoding, from acceptance on {self.num_prompts} "
            f"prompts, step times of {self.step_times_from} and {beyond}."
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
    def context_length(self) -> int:
        return next(iter(self.steps.values())).context_length

    @property
    def disturbed(self) -> bool:
        return any(times.disturbed for times in self.steps.values())


def transfer(
    book: Book, target: Model, here: Machine, shape: tuple[int, int | None], temperature: float | None
) -> Transferred | None:
    """The forecast for `here`, None where acceptance or step times of the target are missing.

    `shape` is (batch, context; None: not known). Step times are those of the machine that fits best, at worst one of
    the same family with the same engine, at the smallest measured batch that is at least as large, and of its sweeps
    at the nearest context (not known: the longest). Acceptance is that of the latest run at `temperature` (None: any).
    """
    with book.reading() as connection:
        sweeps = list(_sweeps(connection, target, here))
        chosen = _covering([sweep for sweep in sweeps if sweep.level in LEVELS[: WORST + 1]], shape)
        if chosen is None:
            return None
        for asked, drafts in _runs(connection, target, temperature):
            workload = replace(asked, batch_size=chosen.batch_size)
            evidence = _evidence(connection, target, workload, (drafts, chosen))
            if evidence.traces and evidence.drafts:
                lender = _lend_calibration(connection, target, workload, evidence, sweeps)
                calibration, lent_by = lender or ((), None)
                return _best(target, workload, replace(evidence, calibration=calibration), (chosen, lent_by))
    return None


def _covering(sweeps: Sequence[_Sweep], shape: tuple[int, int | None]) -> _Sweep | None:
    batch_size, context_length = shape

    def order(sweep: _Sweep) -> tuple[float, ...]:
        level, longest = LEVELS.index(sweep.level), -sweep.context_length
        away = longest if context_length is None else abs(math.log(sweep.context_length / context_length))
        return level, sweep.batch_size, away, sweep.disturbed

    return min((sweep for sweep in sweeps if sweep.batch_size >= batch_size), key=order, default=None)


def _best(
    target: Model, workload: Workload, evidence: Evidence, source: tuple[_Sweep, str | None]
) -> Transferred | None:
    sweep, lent_by = source
    prompts = [_Prompt(digest=digest) for digest in evidence.traces]
    forecaster = Forecaster(evidence, workload, target.run_digest)
    lengths = range(1, sweep.max_length + 1)
    try:
        found = [forecaster.forecast(setup, prompts) for setup in candidates(evidence.drafts, lengths)]
    except NotMeasuredError:  # no output has a second token
        return None
    best = max(found, key=score)  # plain decoding comes first and wins ties
    return Transferred(
        setup=best.setup,
        forecast=best,
        level=sweep.level,
        step_times_from=str(sweep.machine["device"]),
        overhead_from=lent_by,
        batch_size=sweep.batch_size,
        context_length=sweep.context_length,
        num_prompts=len(prompts),
    )


def _rows(connection: Connection, query: Select[Any]) -> Iterator[tables.Row]:
    return (dict(row) for row in connection.execute(query).mappings())


def _sweeps(connection: Connection, target: Model, here: Machine) -> Iterator[_Sweep]:
    """Every sweep of the target by the same engine, newest first."""
    query = select(tables.step_times).filter_by(target_key=target.run_digest).order_by(tables.step_times.c.id.desc())
    parts: dict[str, list[tables.Row]] = {}
    for row in _rows(connection, query):
        parts.setdefault(row["sweep"], []).append(row)
    timed = tables.environments.c.digest.in_({rows[0]["environment_digest"] for rows in parts.values()})
    machines = {row["digest"]: known(row) for row in _rows(connection, select(tables.environments).where(timed))}
    for rows in parts.values():
        machine = machines[rows[0]["environment_digest"]]
        if machine["engine"] != here.get("engine"):
            continue
        records = [tables.sweep_record(row) for row in rows]
        yield _Sweep(
            machine=machine,
            environment_digest=rows[0]["environment_digest"],
            level=match(here, machine).level,
            steps={times.part_digest: times for _, _, times in records},
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
    """Traces of at most 32 prompts, and the drafts whose parts were all traced on them and timed in the sweep."""
    drafts, sweep = given
    about = {"target_key": target.run_digest, "sampling_digest": workload.sampling_digest}
    query = select(tables.target_traces).filter_by(**about).order_by(tables.target_traces.c.prompt_digest)
    traces = {
        row["prompt_digest"]: tables.target_trace_record(row) for row in _rows(connection, query.limit(MAX_PROMPTS))
    }
    acceptances: dict[tuple[str, str], Acceptance] = {}
    for table, record in (
        (tables.acceptance_traces, tables.acceptance_record),
        (tables.lookup_traces, tables.lookup_record),
    ):
        wanted = table.c.prompt_digest.in_(traces)
        for row in _rows(connection, select(table).filter_by(**about).where(wanted)):
            one = record(row)
            if not isinstance(one, LookupTrace) or one.max_length >= sweep.max_length:
                acceptances[one.draft_digest, one.prompt_digest] = one
    usable = [
        draft
        for draft in drafts
        if all(part.digest in sweep.steps for part in draft.parts)
        and all((part.digest, prompt) in acceptances for part in draft.parts for prompt in traces)
    ]
    return Evidence(
        prompts=(),
        traces=traces,
        acceptances=acceptances,
        steps=dict(sweep.steps),
        calibration=(),
        drafts=tuple(usable),
        infeasible=(),
    )


def _lend_calibration(
    connection: Connection, target: Model, workload: Workload, evidence: Evidence, sweeps: Sequence[_Sweep]
) -> tuple[tuple[tuple[Setup, Sample], ...], str] | None:
    """Calibration runs of the machine that fits best, their seconds as they would be here, and that machine's name."""
    longest = max(sweep.max_length for sweep in sweeps)
    setups = {setup.digest: setup for setup in candidates(evidence.drafts, range(1, longest + 1))}
    for sweep in sorted(sweeps, key=lambda one: LEVELS.index(one.level)):
        if sweep.batch_size != workload.batch_size:
            continue
        about = {"target_key": target.run_digest, "environment_digest": sweep.environment_digest}
        query = select(tables.samples).filter_by(**about, anchor_digest=workload.anchor_digest)
        rows = _rows(connection, query.where(tables.samples.c.occasion.startswith(CALIBRATION)))
        samples = [
            (setups[row["setup_digest"]], tables.sample_record(row)) for row in rows if row["setup_digest"] in setups
        ]
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
            used = use_of(setup, sample.shapes, sample.refills, target_part).steps
            stepped_there, stepped_here = (
                sum(count * median(step_samples(steps, *step)) for step, count in used.items())
                for steps in (there, here)
            )
        except NotMeasuredError:
            continue
        decode_s = max(0.0, stepped_here + (sample.decode_s - stepped_there) * scale)
        yield setup, replace(sample, decode_s=decode_s, ttft_s=sample.ttft_s * scale)
