"""From what was measured to choices, each with a sentence saying why.

Plain decoding is the choice wherever no win is proven. It measures nothing and must not know an engine.
"""

from collections.abc import Sequence

from profiles.records.core import PLAIN, Draft, Setup
from tuner.pipeline.points import PointDecision
from tuner.policy.estimates import Forecast
from tuner.policy.policy import Choice
from tuner.search import proof
from tuner.search.objective import score


def judge(anchors: Sequence[PointDecision]) -> list[Choice]:
    """A choice per anchor, in their order; Holm's step-down looks at all of them together."""
    measured = [anchor.measured for anchor in anchors if anchor.measured is not None]
    verdicts = iter(proof.prove(measured))
    proven = [anchor.measured is not None and next(verdicts) for anchor in anchors]
    return [
        _choice(anchor, won and anchor.ruled_out(anchor.candidate or PLAIN) is None)
        for anchor, won in zip(anchors, proven, strict=True)
    ]


def _choice(anchor: PointDecision, proven: bool) -> Choice:
    load = anchor.workload
    subject = anchor.candidate
    if subject is None and len(anchor.forecasts) > 1:
        drafting = [one.setup for one in anchor.forecasts if one.setup != PLAIN]
        subject = next((setup for setup in drafting if anchor.ruled_out(setup) is None), drafting[0])
    return Choice(
        batch_size=load.batch_size,
        context_length=load.context_length,
        domain=anchor.domain,
        temperature=load.temperature,
        top_p=load.top_p,
        top_k=load.top_k,
        setup=anchor.candidate if proven and anchor.candidate is not None else PLAIN,
        reason=_reason(anchor, subject, proven),
        evidence=anchor.evidence,
        forecast=next((one for one in anchor.forecasts if one.setup == subject), None),
        measured=anchor.measured,
        proven=proven,
        alternatives=alternatives([one for one in anchor.forecasts if anchor.ruled_out(one.setup) is None]),
        out_of_time=anchor.out_of_time and not proven,
    )


def _reason(anchor: PointDecision, subject: Setup | None, proven: bool) -> str:
    """One sentence: what was chosen and what the figures were."""
    measured = anchor.measured
    if proven and measured is not None:
        speedup = measured.speedup
        return (
            f"{measured.setup.name} decodes {speedup.estimate:.2f} [{speedup.low:.2f}, {speedup.high:.2f}] times as "
            f"fast as plain decoding on {measured.num_prompts} other prompts, "
            f"{measured.end_to_end.estimate:.2f} end to end."
        )
    if (plain := anchor.ruled_out(PLAIN)) is not None:
        return f"Nothing is feasible: no setup is proven within the limits, and of plain decoding {plain.detail}."
    return f"Plain decoding: {_why_plain(anchor, subject)}."


def _why_plain(anchor: PointDecision, subject: Setup | None) -> str:
    """Why nothing was proven; `subject` is the draft that came closest."""
    if subject is None:
        return anchor.stopped or "there was no draft to try"
    if (broken := anchor.ruled_out(subject)) is not None:
        return f"{subject.name} is infeasible ({broken.reason}): {broken.detail}"
    if anchor.measured is not None:
        return f"{subject.name} is not proven, because {proof.shortfall(anchor.measured)}"
    if anchor.stopped is not None:
        return f"{subject.name} was not proven, because {anchor.stopped}"
    if anchor.race is not None:
        return "no feasible finalist was faster than plain decoding in the race"
    best = next(forecast for forecast in anchor.forecasts if forecast.setup == subject)
    return f"the best draft, {subject.name}, is forecast at {best.speedup.estimate:.2f} times its speed"


def alternatives(forecasts: Sequence[Forecast]) -> tuple[Forecast, ...]:
    """Of every draft the best length by its conservative score, where that beats plain decoding; the best first."""
    best: dict[Draft, Forecast] = {}
    for one in sorted(forecasts, key=score, reverse=True):
        if one.setup.draft is not None and score(one) > 1.0:
            best.setdefault(one.setup.draft, one)
    return tuple(best.values())
