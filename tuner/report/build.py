"""Fills the dossier of a run from its outcome: every candidate with how far it came and why no further.

It only reads what a run has left; what it makes is drawn elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace

from profiles.records.core import PLAIN, Draft, Setup, Workload
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.evidence import Infeasible
from tuner.pipeline.pipeline import Outcome
from tuner.pipeline.points import PointDecision
from tuner.policy.estimates import Forecast, RoundSplit
from tuner.policy.policy import Choice, Policy
from tuner.report.curves import acceptance_curves, staircases
from tuner.report.data import AnchorFigures, Candidate, LoadFigures, ReportData
from tuner.search.objective import score
from tuner.search.proof import shortfall


def report_data(outcome: Outcome, policy: Policy) -> ReportData:
    """What a report shows of a run and of the policy it left, which may keep choices of earlier runs.

    Raises InputError when the policy lacks one of the outcome's anchors.
    """
    held = {choice.filtered_point: choice for choice in policy.choices}
    loads: dict[Workload, list[tuple[PointDecision, AnchorFigures]]] = {}
    for anchor, own in zip(outcome.anchors, outcome.choices, strict=True):
        kept = held.pop(own.filtered_point, None)
        if kept is None:
            raise InputError(
                f"the policy has no choice for {own.domain!r} at {own.filtered_point}: it is of another run"
            )
        figures = AnchorFigures(
            choice=replace(kept, evidence=()),
            from_earlier=kept != own,
            stopped=anchor.stopped,
            noise=None if anchor.race is None else anchor.race.noise,
            num_forecast_prompts=len(anchor.forecast_pool),
            candidates=_candidates(anchor, own),
        )
        loads.setdefault(anchor.workload, []).append((anchor, figures))
    return ReportData(
        created=policy.created,
        target=policy.target,
        drafts=_drafts(outcome),
        environment=policy.environment,
        loads=tuple(_load(workload, rows, policy) for workload, rows in loads.items()),
        standing=tuple(replace(choice, evidence=()) for choice in held.values()),
    )


def _drafts(outcome: Outcome) -> tuple[Draft, ...]:
    """Every draft of the run once, those that failed last."""
    used = [draft for anchor in outcome.anchors if anchor.grounds for draft in anchor.grounds.evidence.drafts]
    failed = [one.setup.draft for one in outcome.infeasible if one.setup.draft is not None]
    return tuple({draft.digest: draft for draft in (*used, *failed)}.values())


def _load(workload: Workload, rows: Sequence[tuple[PointDecision, AnchorFigures]], policy: Policy) -> LoadFigures:
    figures = tuple(figures for _, figures in rows)
    grounds = rows[0][0].grounds
    if grounds is None:
        return LoadFigures(anchors=figures, curves=(), staircases=())
    return LoadFigures(
        anchors=figures,
        curves=acceptance_curves(grounds.evidence, workload, policy.target.run_digest),
        staircases=staircases(grounds.evidence, policy.target),
    )


def _candidates(anchor: PointDecision, own: Choice) -> tuple[Candidate, ...]:
    """Those with a forecast in their order, then the drafts that failed before there was one."""
    known = {forecast.setup for forecast in anchor.forecasts}
    failed: tuple[Infeasible, ...] = () if anchor.grounds is None else anchor.grounds.evidence.infeasible
    return (
        *(_candidate(anchor, forecast, own.proven) for forecast in anchor.forecasts),
        *(_failed(one) for one in failed if one.setup not in known),
    )


def _candidate(anchor: PointDecision, forecast: Forecast, proven: bool) -> Candidate:
    setup, measured, race = forecast.setup, anchor.measured, anchor.race
    state, reason = _state(anchor, forecast, proven)
    return Candidate(
        setup_name=setup.name,
        draft_name=setup.draft.name if setup.draft else PLAIN.name,
        length=setup.length,
        state=state,
        reason=reason,
        forecast_tok_per_s=forecast.tok_per_s,
        forecast_speedup=forecast.speedup,
        measured_tok_per_s=anchor.measured_rate(setup),
        measured_speedup=measured.speedup if measured is not None and measured.setup == setup else None,
        race_speedup=None if race is None else race.speedups.get(setup),
        acceptance_length=forecast.acceptance_length,
        round_split=_split(anchor, setup),
    )


def _failed(one: Infeasible) -> Candidate:
    return Candidate(
        setup_name=one.setup.name,
        draft_name=one.setup.draft.name if one.setup.draft else PLAIN.name,
        length=one.setup.length,
        state="infeasible",
        reason=one.detail,
    )


def _split(anchor: PointDecision, setup: Setup) -> RoundSplit | None:
    assert anchor.grounds is not None  # it has forecasts
    try:
        return anchor.grounds.forecaster.split(setup, anchor.forecast_pool)
    except NotMeasuredError:
        return None


def _state(anchor: PointDecision, forecast: Forecast, proven: bool) -> tuple[str, str]:
    """How far a candidate came, and why no further."""
    setup = forecast.setup
    ruled_out = anchor.ruled_out(setup)
    if ruled_out is not None:
        return "infeasible", ruled_out.detail
    if setup == PLAIN:
        return "baseline", "what every other setup must beat"
    if setup != anchor.candidate:
        return _raced(anchor, setup) or ("forecast only", _why_not_raced(anchor, forecast))
    if anchor.measured is None:
        return "not proven", anchor.stopped or "it was not measured"
    if proven:
        return "proven", f"faster than plain decoding on {anchor.measured.num_prompts} prompts the race did not use"
    return "not proven", shortfall(anchor.measured)


def _raced(anchor: PointDecision, setup: Setup) -> tuple[str, str] | None:
    """The state of a setup that the race saw; None for others."""
    race = anchor.race
    if race is None or setup not in (*race.pruned, *race.speedups):
        return None
    if setup in race.pruned:
        return "pruned in the race", "it was losing, prompt by prompt, to the best so far"
    own = race.speedups[setup]
    if anchor.candidate is None:
        return "raced", f"{own:.2f} in the race, where no setup to choose was faster than plain decoding"
    taken = race.speedups[anchor.candidate]
    text = f"{anchor.candidate.name} was taken with {taken:.2f} in the race against {own:.2f}"
    return "raced", f"{text}: near-equals go to fewer weights, then to the shorter" if own >= taken else text


def _why_not_raced(anchor: PointDecision, forecast: Forecast) -> str:
    high = forecast.speedup.high
    if high <= 1.0:
        return f"its forecast interval ends at {high:.2f}, not above plain decoding"
    best = max(score(one) for one in anchor.forecasts if one.setup != PLAIN and anchor.ruled_out(one.setup) is None)
    if high < best:
        return f"its forecast interval ends at {high:.2f}, below the low end of the best, {best:.2f}"
    if anchor.race is not None:
        return "the finalists were forecast faster"
    if anchor.candidate is None:
        return anchor.stopped or "it was not run"
    return "too few prompts were left for a race: only the best forecast was run"
