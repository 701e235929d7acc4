"""Builds the report data of a run: every candidate, how far it came, and why it went no further."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.acceptance.rates import acceptance_by_position
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import NotMeasuredError
from profiles.stats import share_interval
from tuner.forecast.evidence import Evidence
from tuner.pipeline.pipeline import Outcome
from tuner.pipeline.points import PointDecision
from tuner.policy.estimates import Forecast
from tuner.policy.policy import Choice, Policy
from tuner.policy.query import MIXED
from tuner.report.data import (
    AcceptanceCurve,
    Candidate,
    LoadFigures,
    PointFigures,
    Position,
    ReportData,
    State,
)
from tuner.search.objective import score
from tuner.search.proof import shortfall


def report_data(outcome: Outcome, policy: Policy) -> ReportData:
    """What a report shows of a run that left this policy."""
    loads: dict[Workload, list[tuple[PointDecision, PointFigures]]] = {}
    for point, choice in zip(outcome.points, outcome.choices, strict=True):
        figures = PointFigures(
            choice=replace(choice, evidence=()),
            stopped=point.stopped,
            noise=None if point.race is None else point.race.noise,
            num_forecast_prompts=len(point.plan.forecast_prompts),
            candidates=_candidates(point, choice),
        )
        loads.setdefault(point.workload, []).append((point, figures))
    return ReportData(
        created=policy.created,
        target=policy.target,
        drafts=_drafts(outcome),
        environment=policy.environment,
        loads=tuple(_load(workload, rows) for workload, rows in loads.items()),
    )


def _drafts(outcome: Outcome) -> tuple[Draft, ...]:
    """Every draft of the run once, those that failed last."""
    used = [draft for point in outcome.points if point.evidence for draft in point.evidence.drafts]
    failed = [failure.setup.draft for failure in outcome.infeasible if failure.setup.draft is not None]
    return tuple({draft.digest: draft for draft in (*used, *failed)}.values())


def _load(workload: Workload, rows: Sequence[tuple[PointDecision, PointFigures]]) -> LoadFigures:
    point = rows[0][0]
    curves: tuple[AcceptanceCurve, ...] = ()
    if point.evidence is not None and point.forecasts:
        longest = max(forecast.setup.length for forecast in point.forecasts)
        curves = acceptance_curves(point.evidence, workload, longest)
    return LoadFigures(points=tuple(figures for _, figures in rows), curves=curves)


def _candidates(point: PointDecision, choice: Choice) -> tuple[Candidate, ...]:
    """Those with a forecast in their order, then the drafts that failed before there was one."""
    failed = {} if point.evidence is None else {failure.setup: failure for failure in point.evidence.infeasible}
    for forecast in point.forecasts:
        failed.pop(forecast.setup, None)
    forecast_candidates = (_candidate(point, forecast, choice.proven) for forecast in point.forecasts)
    return (
        *forecast_candidates,
        *(Candidate(**_names(setup), state="infeasible", reason=failure.detail) for setup, failure in failed.items()),
    )


def _names(setup: Setup) -> dict[str, Any]:
    return {"setup_name": setup.name, "draft_name": (setup.draft or PLAIN).name, "length": setup.length}


def _candidate(point: PointDecision, forecast: Forecast, proven: bool) -> Candidate:
    setup, measured, race = forecast.setup, point.measured, point.race
    state, reason = _state(point, forecast, proven)
    split = None
    assert point.forecaster is not None  # it has forecasts
    with contextlib.suppress(NotMeasuredError):
        split = point.forecaster.split(setup, point.plan.forecast_prompts)
    return Candidate(
        **_names(setup),
        state=state,
        reason=reason,
        forecast_tok_per_s=forecast.tok_per_s,
        forecast_speedup=forecast.speedup,
        measured_tok_per_s=point.measured_rate(setup),
        measured_speedup=measured.speedup if measured is not None and measured.setup == setup else None,
        race_speedup=None if race is None else race.speedups.get(setup),
        acceptance_length=forecast.acceptance_length,
        round_split=split,
    )


def _state(point: PointDecision, forecast: Forecast, proven: bool) -> tuple[State, str]:
    """How far a candidate came, and why no further."""
    setup = forecast.setup
    ruled_out = point.ruled_out(setup)
    if ruled_out is not None:
        return "infeasible", ruled_out.detail
    if setup == PLAIN:
        return "baseline", "what every other setup must beat"
    if setup != point.candidate:
        return _raced(point, setup) or ("forecast only", _why_not_raced(point, forecast))
    if point.measured is None:
        return "not proven", point.stopped or "it was not measured"
    if proven:
        return "proven", f"faster than plain decoding on {point.measured.num_prompts} prompts the race did not use"
    return "not proven", shortfall(point.measured, point.plan.objective)


def _raced(point: PointDecision, setup: Setup) -> tuple[State, str] | None:
    """The state of a setup that the race saw; None for others."""
    race = point.race
    if race is None or setup not in (*race.pruned, *race.speedups):
        return None
    if setup in race.pruned:
        return "pruned in the race", "it was losing, prompt by prompt, to the best so far"
    speedup = race.speedups[setup]
    if point.candidate is None:
        return "raced", f"{speedup:.2f} in the race, where no setup to choose was faster than plain decoding"
    taken = race.speedups[point.candidate]
    text = f"{point.candidate.name} was taken with {taken:.2f} in the race against {speedup:.2f}"
    return "raced", f"{text}: near-equals go to fewer weights, then to the shorter" if speedup >= taken else text


def _why_not_raced(point: PointDecision, forecast: Forecast) -> str:
    high = forecast.speedup.high
    if high <= 1.0:
        return f"its forecast interval ends at {high:.2f}, not above plain decoding"
    rivals = (row for row in point.forecasts if row.setup != PLAIN and point.ruled_out(row.setup) is None)
    best = max(map(score, rivals))
    if high < best:
        return f"its forecast interval ends at {high:.2f}, below the low end of the best, {best:.2f}"
    if point.race is not None:
        return "the race had the best of each draft; further lengths where a forecast did not hold"
    if point.candidate is None:
        return point.stopped or "it was not run"
    return "too few prompts were left for a race: only the best forecast was run"


def acceptance_curves(evidence: Evidence, workload: Workload, length: int) -> tuple[AcceptanceCurve, ...]:
    """Acceptance by position of every draft, by domain and over all domains, at `length`, the largest.

    Prompts without a round are left out.
    """
    domains = list(dict.fromkeys(prompt.domain for prompt in evidence.prompts))
    curves = []
    for draft in evidence.components:
        tables = [
            (prompt.domain, _positions(evidence, workload, draft, prompt, length=length)) for prompt in evidence.prompts
        ]
        for domain in [MIXED, *domains] if len(domains) > 1 else domains:
            of_domain = [table for name, table in tables if table and domain in (name, MIXED)]
            curves.append(
                AcceptanceCurve(
                    draft_name=draft.name, domain=domain, num_prompts=len(of_domain), positions=_pooled(of_domain)
                )
            )
    return tuple(curves)


def _positions(
    evidence: Evidence, workload: Workload, draft: Draft, prompt: Prompt, *, length: int
) -> dict[int, tuple[float, float]]:
    """Position -> (rounds that proposed that far, those that kept that far) of one draft on one prompt."""
    rounds = expected_rounds(
        evidence.traces[prompt.digest],
        evidence.acceptances[draft.digest, prompt.digest],
        length,
        workload.max_new_tokens,
        past_end=evidence.capabilities.past_end,
    ).rounds
    return {position: (tried, share * tried) for position, tried, share in acceptance_by_position(rounds)}


def _pooled(tables: Sequence[Mapping[int, tuple[float, float]]]) -> tuple[Position, ...]:
    """The positions over prompts; intervals count a prompt as one round: too wide sooner than too narrow."""
    pooled = []
    for position in sorted({number for table in tables for number in table}):
        pairs = [table[position] for table in tables if position in table]
        tried, accepted = map(sum, zip(*pairs, strict=True))
        interval = share_interval(min(1.0, accepted / tried) * len(pairs), len(pairs))
        pooled.append(Position(position=position, num_rounds=tried, accepted=interval))
    return tuple(pooled)
