"""Boils an outcome's evidence down to what a selector starts from (`tuner.policy.prior`).

The figures are those of the forecasts: the same walks, step times and overheads. It measures nothing and must not know
how a selector uses them.
"""

from collections.abc import Sequence

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP, RoundCounts
from profiles.acceptance.rates import acceptance_length
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Prompt, Setup
from profiles.records.evidence import StepShape
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.points import PointDecision
from tuner.policy.prior import DraftAcceptance, Prior, RoundTimes


def summarise(anchors: Sequence[PointDecision], lengths: Sequence[int]) -> Prior | None:
    """What the forecasts of all anchors rest on; None where no draft was forecast.

    Where a limit was broken, lengths from there on are left out, but for what was chosen: a selector must not try them.
    """
    known = [anchor for anchor in anchors if anchor.grounds is not None and anchor.forecasts]
    forecast = dict.fromkeys(one.setup.draft for anchor in known for one in anchor.forecasts if one.setup.draft)
    grounds = [anchor.grounds.evidence for anchor in known if anchor.grounds is not None]
    drafts = tuple(draft for draft in forecast if all(evidence.is_traced(draft) for evidence in grounds))
    if not drafts:
        return None
    rising = tuple(sorted(set(lengths)))
    kept: dict[tuple[int, str, float], DraftAcceptance] = {}
    times: dict[tuple[int | None, int, int, float], RoundTimes] = {}
    for anchor in known:
        assert anchor.grounds is not None
        forecaster, load = anchor.grounds.forecaster, anchor.workload
        point = load.batch_size, load.context_length, load.temperature
        times.setdefault((None, *point), _round_times(None, point, (forecaster.round_s(PLAIN, StepShape(1)),), 0))
        for number, draft in enumerate(drafts):
            if draft not in anchor.grounds.evidence.drafts:
                continue
            walks = [forecaster.rounds(Setup(draft=draft, length=k), anchor.forecast_pool) for k in rising]
            key = (number, anchor.domain, load.temperature)
            if walks[-1].num_rounds > 0.0:
                kept.setdefault(key, _kept(key, walks, rising[-1]))
            longest = _longest([one for one in known if one.workload == load], draft, rising)
            if (number, *point) not in times and longest > 0:
                seconds = _times(forecaster, draft, anchor.forecast_pool, rising[-1])
                times[number, *point] = _round_times(number, point, seconds, longest, _catch_up_s(forecaster, draft))
    return Prior(drafts=drafts, lengths=rising, acceptance=tuple(kept.values()), round_times=tuple(times.values()))


def _longest(anchors: Sequence[PointDecision], draft: Draft, rising: Sequence[int]) -> int:
    """The longest length of a draft that may be tried at a load; 0: none."""
    broken = [one.setup.length for anchor in anchors for one in anchor.infeasible if one.setup.draft == draft]
    chosen = [one.candidate.length for one in anchors if one.candidate is not None and one.candidate.draft == draft]
    below = [length for length in rising if not broken or length < min(broken)]
    return max([0, *below, *(length for length in chosen if length not in broken)])


def _round_times(
    draft: int | None, point: tuple[int, int, float], seconds: tuple[float, ...], longest: int, catch_up_s: float = 0.0
) -> RoundTimes:
    batch_size, context_length, temperature = point
    return RoundTimes(
        draft=draft,
        batch_size=batch_size,
        context_length=context_length,
        temperature=temperature,
        max_length=longest,
        seconds=seconds,
        catch_up_s=catch_up_s,
    )


def _kept(key: tuple[int, str, float], walks: Sequence[RoundCounts], longest: int) -> DraftAcceptance:
    """Figures of one draft from its walks at every length, the longest last."""
    number, domain, temperature = key
    rounds = walks[-1].rounds
    tested, held = [0.0] * longest, [0.0] * longest
    for (proposed, accepted), count in rounds.items():
        for place in range(min(proposed, accepted + 1)):
            tested[place] += count
            held[place] += count if accepted > place else 0.0
    return DraftAcceptance(
        draft=number,
        domain=domain,
        temperature=temperature,
        propose_prob=min(1.0, sum(count for (proposed, _), count in rounds.items() if proposed) / walks[-1].num_rounds),
        accept_probs=tuple(min(1.0, mine / all_) if all_ else 0.0 for mine, all_ in zip(held, tested, strict=True)),
        mean_tokens=tuple(acceptance_length(walked.rounds) or 1.0 for walked in walks),
        num_rounds=walks[-1].num_rounds,
    )


def _times(forecaster: Forecaster, draft: Draft, prompts: Sequence[Prompt], longest: int) -> tuple[float, ...]:
    """Seconds of a round by the number of tokens proposed, the mean over what such rounds ran in the walks."""
    seconds = [forecaster.round_s(Setup(draft=draft, length=1), StepShape(1))]
    for length in range(1, longest + 1):
        setup = Setup(draft=draft, length=length)
        usual = StepShape(length + 1) if draft.kind == "ngram" else StepShape(length + 1, length, CATCH_UP_WIDTHS[0])
        ran = {
            shape: count
            for shape, count in forecaster.rounds(setup, prompts).shapes.items()
            if shape.target_width == length + 1
        }
        ran = ran or {usual: 1.0}
        spent = sum(count * forecaster.round_s(setup, shape) for shape, count in ran.items())
        seconds.append(spent / sum(ran.values()))
    return tuple(seconds)


def _catch_up_s(forecaster: Forecaster, draft: Draft) -> float:
    """Per token of text: a wide first step against a narrow one. A look-up only indexes the text."""
    if draft.kind == "ngram":
        return 0.0
    setup, narrow = Setup(draft=draft, length=1), CATCH_UP_WIDTHS[0]
    more = forecaster.round_s(setup, StepShape(2, 1, WIDEST_CATCH_UP)) - forecaster.round_s(
        setup, StepShape(2, 1, narrow)
    )
    return max(0.0, more) / (WIDEST_CATCH_UP - narrow)
