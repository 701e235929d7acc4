"""Figures that only a report shows: acceptance by position with intervals, and step times in quantiles."""

from collections.abc import Mapping, Sequence

import numpy
from scipy.stats import t

from profiles import stats
from profiles.acceptance.expected_rounds import expected_rounds
from profiles.acceptance.rates import acceptance_by_position
from profiles.records.core import Draft, Interval, Model, Prompt, Workload
from profiles.stats import Z_95
from tuner.forecast.evidence import Evidence
from tuner.policy.query import MIXED
from tuner.report.data import AcceptanceCurve, Position, StepTimeCurve, WidthTime


def acceptance_curves(evidence: Evidence, workload: Workload, target_part: str) -> tuple[AcceptanceCurve, ...]:
    """Acceptance by position of every draft, by domain and over all domains, at the largest length.

    Prompts without a round are left out.
    """
    length = _longest_length(evidence, target_part)
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


def _longest_length(evidence: Evidence, target_part: str) -> int:
    """The largest speculation length that was timed: the width of the target's step, or of whole rounds, less one."""
    parts = [part.digest for part in evidence.components] if evidence.capabilities.times == "rounds" else [target_part]
    return max((width for part in parts for width in evidence.steps[part].samples_s), default=1) - 1


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
    """The positions over prompts; where a share of 0 or 1 hides how alike rounds are, the position before tells."""
    pooled = []
    alike: float | None = None
    for position in sorted({number for table in tables for number in table}):
        pairs = [table[position] for table in tables if position in table]
        tried, accepted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        alike = design_effect(accepted, tried) or alike
        interval = share_interval(accepted, tried, alike or sum(tried) / len(tried))
        pooled.append(Position(position=position, num_rounds=sum(tried), accepted=interval))
    return tuple(pooled)


def design_effect(accepted: Sequence[float], tried: Sequence[float]) -> float | None:
    """How many rounds tell as much as one independent round would, at least 1; None where prompts do not differ.

    The variance of the ratio sum(kept) / sum(tried) between prompts (Cochran 1977, 6.3) over the binomial one.
    """
    num_prompts, total = len(tried), sum(tried)
    share = sum(accepted) / total
    excess = numpy.asarray(accepted, float) - share * numpy.asarray(tried, float)
    spread = float(excess @ excess)
    if num_prompts < 2 or spread < 1e-12 or not 0.0 < share < 1.0:
        return None
    variance = num_prompts / (num_prompts - 1) * spread / total**2
    return max(1.0, variance * total / (share * (1.0 - share)))


def share_interval(accepted: Sequence[float], tried: Sequence[float], design: float) -> Interval:
    """sum(kept) / sum(tried) over prompts, with a 95 % interval that accounts for the similarity of rounds of a prompt.

    Wilson's interval at the effective sample size of Korn and Graubard (1998): rounds / `design`, times (z / t)^2 for
    few prompts. A single prompt counts as one round. `tried` is above 0 for every prompt.
    """
    num_prompts, total = len(tried), sum(tried)
    size = total / design * (Z_95 / float(t.ppf(0.975, num_prompts - 1))) ** 2 if num_prompts > 1 else 1.0
    return stats.share_interval(size * min(1.0, sum(accepted) / total), size)


def step_time_curves(evidence: Evidence, target: Model) -> tuple[StepTimeCurve, ...]:
    """Step times of the target, then of the drafts' components."""
    parts = {target.run_digest: (target.name, "target")}
    parts |= {part.digest: (part.name, part.kind) for part in evidence.components}
    whole = evidence.capabilities.times == "rounds"
    curves = []
    for digest, (name, kind) in parts.items():
        times = evidence.steps[digest]
        widths = []
        for width, samples in times.samples_s.items():
            low, median, high = (float(value) for value in numpy.quantile(samples, (0.1, 0.5, 0.9)))
            widths.append(WidthTime(width=width, median_s=median, low_s=low, high_s=high))
        shown = "round" if whole and kind != "target" else kind
        curves.append(StepTimeCurve(name=name, kind=shown, disturbed=times.disturbed, widths=tuple(widths)))
    return tuple(curves)
