"""Condenses the evidence of a run into what a selector starts from: the forecasts' own acceptance and round times."""

from collections.abc import Sequence
from typing import Any

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP, RoundCounts
from profiles.acceptance.rates import acceptance_length
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Prompt, Setup
from profiles.records.evidence import StepShape
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.points import PointDecision
from tuner.policy.prior import DraftAcceptance, Prior, RoundTimes


def build_prior(points: Sequence[PointDecision], lengths: Sequence[int]) -> Prior | None:
    """The prior of all points of a run; None where no traced draft was forecast.

    Where a length broke a limit, a selector must not try it or a longer one, unless that one was chosen.
    """
    points = [point for point in points if point.forecasts]
    evidence = [point.evidence for point in points if point.evidence is not None]
    drafts = tuple(
        draft
        for draft in dict.fromkeys(forecast.setup.draft for point in points for forecast in point.forecasts)
        if draft is not None and all(each.is_traced(draft) for each in evidence)
    )
    if not drafts:
        return None
    ordered = tuple(sorted(set(lengths)))
    acceptance: dict[tuple[int, str, float], DraftAcceptance] = {}
    times: dict[tuple[Any, ...], RoundTimes] = {}
    for point in points:
        assert point.evidence is not None
        assert point.forecaster is not None
        forecaster, load, prompts = point.forecaster, point.workload, point.plan.forecast_prompts
        where: dict[str, Any] = {
            "batch_size": load.batch_size,
            "context_length": load.context_length,
            "temperature": load.temperature,
        }
        plain = RoundTimes(draft=None, max_length=0, seconds=(forecaster.round_s(PLAIN, StepShape(1)),), **where)
        times.setdefault((None, *where.values()), plain)
        for number, draft in enumerate(drafts):
            if draft not in point.evidence.drafts:
                continue
            by_length = [forecaster.rounds(Setup(draft=draft, length=length), prompts) for length in ordered]
            if by_length[-1].num_rounds > 0.0:
                figures = _acceptance(
                    by_length, draft=number, domain=point.domain, temperature=load.temperature, max_length=ordered[-1]
                )
                acceptance.setdefault((number, point.domain, load.temperature), figures)
            max_length = _max_length([other for other in points if other.workload == load], draft, ordered)
            if (number, *where.values()) not in times and max_length > 0:
                times[number, *where.values()] = RoundTimes(
                    draft=number,
                    max_length=max_length,
                    seconds=tuple(_seconds_by_proposed(forecaster, draft, prompts, ordered[-1])),
                    catch_up_s=_catch_up_s(forecaster, draft),
                    **where,
                )
    return Prior(
        drafts=drafts, lengths=ordered, acceptance=tuple(acceptance.values()), round_times=tuple(times.values())
    )


def _max_length(points: Sequence[PointDecision], draft: Draft, lengths: Sequence[int]) -> int:
    """The longest length of a draft that may be tried at a load; 0 for none."""
    ruled_out = [infeasible.setup for point in points for infeasible in point.infeasible]
    broken = [setup.length for setup in ruled_out if setup.draft == draft]
    candidates = [point.candidate for point in points]
    chosen = [setup.length for setup in candidates if setup is not None and setup.draft == draft]
    below = [length for length in lengths if not broken or length < min(broken)]
    return max([0, *below, *(length for length in chosen if length not in broken)])


def _acceptance(
    by_length: Sequence[RoundCounts], *, draft: int, domain: str, temperature: float, max_length: int
) -> DraftAcceptance:
    """Figures of one draft from its expected rounds at every length, the longest last."""
    rounds, num_rounds = by_length[-1].rounds, by_length[-1].num_rounds
    tested, accepted_there = [0.0] * max_length, [0.0] * max_length
    for (proposed, accepted), count in rounds.items():
        for index in range(min(proposed, accepted + 1)):
            tested[index] += count
            accepted_there[index] += count if accepted > index else 0.0
    return DraftAcceptance(
        draft=draft,
        domain=domain,
        temperature=temperature,
        propose_prob=min(1.0, sum(count for (proposed, _), count in rounds.items() if proposed) / num_rounds),
        accept_probs=tuple(
            min(1.0, part / whole) if whole else 0.0 for part, whole in zip(accepted_there, tested, strict=True)
        ),
        mean_tokens=tuple(acceptance_length(counts.rounds) or 1.0 for counts in by_length),
        num_rounds=num_rounds,
    )


def _seconds_by_proposed(forecaster: Forecaster, draft: Draft, prompts: Sequence[Prompt], longest: int) -> list[float]:
    """Seconds of a round by the number of tokens proposed: the mean over the shapes that such rounds have."""
    seconds = [forecaster.round_s(Setup(draft=draft, length=1), StepShape(1))]
    for length in range(1, longest + 1):
        setup = Setup(draft=draft, length=length)
        usual = StepShape(length + 1) if draft.kind == "ngram" else StepShape(length + 1, length, CATCH_UP_WIDTHS[0])
        expected = forecaster.rounds(setup, prompts).shapes
        shapes = {shape: count for shape, count in expected.items() if shape.target_width == length + 1} or {usual: 1.0}
        total_s = sum(count * forecaster.round_s(setup, shape) for shape, count in shapes.items())
        seconds.append(total_s / sum(shapes.values()))
    return seconds


def _catch_up_s(forecaster: Forecaster, draft: Draft) -> float:
    """Seconds per token of text that the draft model takes in late: a wide first step against a narrow one."""
    if draft.kind == "ngram":
        return 0.0
    setup, narrow = Setup(draft=draft, length=1), CATCH_UP_WIDTHS[0]
    wide_s, narrow_s = (forecaster.round_s(setup, StepShape(2, 1, width)) for width in (WIDEST_CATCH_UP, narrow))
    return max(0.0, wide_s - narrow_s) / (WIDEST_CATCH_UP - narrow)
