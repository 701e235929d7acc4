"""Turns what was measured into choices, each with a sentence saying why."""

from collections.abc import Sequence

from profiles.records.core import PLAIN, Draft, Setup
from tuner.pipeline.points import PointDecision
from tuner.policy.estimates import Forecast
from tuner.policy.policy import Choice
from tuner.search import proof
from tuner.search.objective import MIN_SPEEDUP, score


def judge(points: Sequence[PointDecision]) -> list[Choice]:
    """A choice per operating point, in their order; Holm's step-down looks at every proof of all of them together."""
    measured = [point.measured for point in points if point.measured is not None]
    verdicts = iter(proof.prove(measured, points[0].plan.objective if points else "tpot"))
    choices = []
    for point in points:
        passes = point.measured is not None and next(verdicts) and point.objection is None
        choices.append(_choice(point, passes and point.ruled_out(point.candidate or PLAIN) is None))
    return choices


def _choice(point: PointDecision, proven: bool) -> Choice:
    load = point.workload
    subject = point.candidate
    if subject is None and len(point.forecasts) > 1:
        drafting = [forecast.setup for forecast in point.forecasts if forecast.setup != PLAIN]
        subject = next((setup for setup in drafting if point.ruled_out(setup) is None), drafting[0])
    return Choice(
        batch_size=load.batch_size,
        context_length=load.context_length,
        domain=point.domain,
        temperature=load.temperature,
        top_p=load.top_p,
        top_k=load.top_k,
        setup=point.candidate if proven and point.candidate is not None else PLAIN,
        reason=_reason(point, subject, proven),
        evidence=point.units,
        forecast=next((forecast for forecast in point.forecasts if forecast.setup == subject), None),
        measured=point.measured,
        proven=proven,
        out_of_time=point.out_of_time and not proven,
        alternatives=alternatives(
            [forecast for forecast in point.forecasts if point.ruled_out(forecast.setup) is None]
        ),
    )


def _reason(point: PointDecision, subject: Setup | None, proven: bool) -> str:
    """One sentence: what was chosen and what the figures were."""
    measured = point.measured
    if proven and measured is not None:
        speedup = measured.speedup
        prompts = f"{measured.num_prompts} other prompts"
        if (num_forecast := measured.num_forecast_prompts or 0) > measured.num_prompts:
            prompts += f" (with forecasts of {num_forecast})"
        if point.plan.objective == "throughput":
            whole = measured.end_to_end
            return (
                f"{measured.setup.name} answers requests {whole.estimate:.2f} [{whole.low:.2f}, {whole.high:.2f}] "
                f"times as fast as plain decoding on {prompts}, {speedup.estimate:.2f} while decoding."
            )
        return (
            f"{measured.setup.name} decodes {speedup.estimate:.2f} [{speedup.low:.2f}, {speedup.high:.2f}] times as "
            f"fast as plain decoding on {prompts}, "
            f"{measured.end_to_end.estimate:.2f} end to end."
        )
    if (plain := point.ruled_out(PLAIN)) is not None:
        return f"Nothing is feasible: no setup is proven within the limits, and of plain decoding {plain.detail}."
    return f"Plain decoding: {_why_plain(point, subject)}."


def _why_plain(point: PointDecision, subject: Setup | None) -> str:
    """Why nothing was proven; `subject` is the draft that came closest."""
    if subject is None:
        return point.stopped or "there was no draft to try"
    if (infeasible := point.ruled_out(subject)) is not None:
        return f"{subject.name} is infeasible ({infeasible.reason}): {infeasible.detail}"
    if point.measured is not None:
        shortfall = point.objection or proof.shortfall(point.measured, point.plan.objective)
        ended = f"; {point.stopped}" if point.out_of_time else ""
        return f"{subject.name} is not proven, because {shortfall}{ended}"
    if point.stopped is not None:
        return f"{subject.name} was not proven, because {point.stopped}"
    if point.race is not None:
        return f"no feasible finalist came within a standard error of {MIN_SPEEDUP:g} times its speed in the race"
    best = next(forecast for forecast in point.forecasts if forecast.setup == subject)
    return f"the best draft, {subject.name}, is forecast at {best.speedup.estimate:.2f} times its speed"


def alternatives(forecasts: Sequence[Forecast]) -> tuple[Forecast, ...]:
    """Of every draft the best length by its score, where that beats plain decoding; the best first."""
    best: dict[Draft, Forecast] = {}
    for forecast in sorted(forecasts, key=score, reverse=True):
        if forecast.setup.draft is not None and score(forecast) > 1.0:
            best.setdefault(forecast.setup.draft, forecast)
    return tuple(best.values())
