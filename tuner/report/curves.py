"""Figures that only a report shows: acceptance by position with intervals, and staircases in quantiles.

Arithmetic on evidence; nothing here is measured, drawn or spelled out.
"""

import math
from collections.abc import Mapping, Sequence

import numpy
from scipy import stats

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.acceptance.rates import acceptance_by_position
from profiles.records.core import Draft, Interval, Model, Prompt, Workload
from tuner.forecast.evidence import Evidence
from tuner.policy.query import MIXED
from tuner.report.data import AcceptanceCurve, Position, Stair, Staircase


def acceptance_curves(evidence: Evidence, workload: Workload, target_part: str) -> tuple[AcceptanceCurve, ...]:
    """Of every draft on the prompts of every domain, and on all where there are several: walks at the largest length.

    Positions count as in `formulas.acceptance_by_position`. Prompts without a round are left out.
    """
    length = _longest_length(evidence, target_part)
    domains: dict[str, list[Prompt]] = {}
    for prompt in evidence.prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    if len(domains) > 1:
        domains = {MIXED: list(evidence.prompts)} | domains
    curves = []
    for draft in evidence.components:
        counted = {
            prompt.digest: _positions(evidence, workload, (draft, prompt), length) for prompt in evidence.prompts
        }
        for domain, prompts in domains.items():
            tables = [counted[prompt.digest] for prompt in prompts if counted[prompt.digest]]
            positions = _pooled(tables)
            curves.append(
                AcceptanceCurve(draft_name=draft.name, domain=domain, num_prompts=len(tables), positions=positions)
            )
    return tuple(curves)


def _longest_length(evidence: Evidence, target_part: str) -> int:
    """The largest speculation length that was timed: the width of the target's step, or of whole rounds, less one."""
    parts = [part.digest for part in evidence.components] if evidence.capabilities.times == "rounds" else [target_part]
    return max((width for part in parts for width in evidence.steps[part].samples_s), default=1) - 1


def _positions(
    evidence: Evidence, workload: Workload, asked: tuple[Draft, Prompt], length: int
) -> dict[int, tuple[float, float]]:
    """Position -> (rounds that proposed that far, those that kept that far) of one draft on one prompt."""
    draft, prompt = asked
    acceptance = evidence.acceptances[draft.digest, prompt.digest]
    past_end = evidence.capabilities.past_end
    walked = expected_rounds(
        evidence.traces[prompt.digest], acceptance, length, workload.max_new_tokens, past_end=past_end
    )
    return {position: (tried, share * tried) for position, tried, share in acceptance_by_position(walked.rounds)}


def _pooled(tables: Sequence[Mapping[int, tuple[float, float]]]) -> tuple[Position, ...]:
    """The positions over prompts; where a share of 0 or 1 hides how alike rounds are, the position before tells."""
    found = []
    alike: float | None = None
    for position in sorted({one for table in tables for one in table}):
        pairs = [table[position] for table in tables if position in table]
        tried, kept = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        alike = design_effect(kept, tried) or alike
        interval = share_interval(kept, tried, alike or sum(tried) / len(tried))
        found.append(Position(position=position, num_rounds=sum(tried), kept=interval))
    return tuple(found)


def design_effect(kept: Sequence[float], tried: Sequence[float]) -> float | None:
    """How many rounds tell as much as one independent round would, at least 1; None where prompts do not differ.

    The variance of the ratio sum(kept) / sum(tried) between prompts (Cochran 1977, 6.3) over the binomial one.
    """
    num_prompts, total = len(tried), sum(tried)
    share = sum(kept) / total
    excess = numpy.asarray(kept, float) - share * numpy.asarray(tried, float)
    spread = float(excess @ excess)
    if num_prompts < 2 or spread < 1e-12 or not 0.0 < share < 1.0:
        return None
    variance = num_prompts / (num_prompts - 1) * spread / total**2
    return max(1.0, variance * total / (share * (1.0 - share)))


def share_interval(kept: Sequence[float], tried: Sequence[float], design: float) -> Interval:
    """sum(kept) / sum(tried) over prompts, with a 95 % interval that knows that rounds of a prompt are alike.

    Wilson's interval (1927) at the effective sample size of Korn and Graubard (1998): rounds / `design`, times
    (z / t)^2 for few prompts. A single prompt counts as one round. `tried` is above 0 for every prompt.
    """
    num_prompts, total = len(tried), sum(tried)
    share = min(1.0, max(0.0, sum(kept) / total))
    z = float(stats.norm.ppf(0.975))
    size = total / design * (z / float(stats.t.ppf(0.975, num_prompts - 1))) ** 2 if num_prompts > 1 else 1.0
    middle = (share + z**2 / (2.0 * size)) / (1.0 + z**2 / size)
    reach = z / (1.0 + z**2 / size) * math.sqrt(share * (1.0 - share) / size + z**2 / (4.0 * size**2))
    return Interval(estimate=share, low=max(0.0, min(middle - reach, share)), high=min(1.0, max(middle + reach, share)))


def staircases(evidence: Evidence, target: Model) -> tuple[Staircase, ...]:
    """The target's staircase, then those of the drafts' parts, by name."""
    parts = {target.run_digest: (target.name, "target")}
    parts |= {part.digest: (part.name, part.kind) for part in evidence.components}
    whole = evidence.capabilities.times == "rounds"
    found = []
    for digest, (name, kind) in parts.items():
        times = evidence.steps[digest]
        stairs = []
        for width, samples in times.samples_s.items():
            low, median, high = (float(value) for value in numpy.quantile(samples, (0.1, 0.5, 0.9)))
            stairs.append(Stair(width=width, median_s=median, low_s=low, high_s=high))
        shown = "round" if whole and kind != "target" else kind
        found.append(Staircase(name=name, kind=shown, disturbed=times.disturbed, stairs=tuple(stairs)))
    return tuple(found)
