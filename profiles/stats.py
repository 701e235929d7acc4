"""Statistics of timed runs: paired ratios with intervals, Holm's step-down, the median."""

import math
from collections.abc import Hashable, Iterable, Sequence

import numpy

from profiles.records.core import Interval
from profiles.records.errors import InputError

Z_95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


def rate_interval(seconds: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Tokens per second over prompts: ratio of totals, 95 % t interval of the linearised ratio (Cochran 1977, 6.3).

    Raises InputError under two prompts or without a token.
    """
    return _ratio_of_totals([tokens], [seconds])[0]


def speedup_interval(
    plain_s: Sequence[float],
    plain_tokens: Sequence[int],
    chosen_s: Sequence[float],
    chosen_tokens: Sequence[int],
    *,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.05,
) -> tuple[Interval, float]:
    """Plain seconds per token over chosen seconds per token, paired by prompt, and the p-value of "equal".

    A t interval of the log of the ratio of totals, linearised over prompts (Cochran 1977, 6.3): a percentile bootstrap
    of few prompts covers too seldom.

    Args:
        strata: the domain of each prompt, where each has a fixed share; only what varies within domains is uncertain
            then (Cochran 1977, 6.11), with Satterthwaite's degrees of freedom.
        level: the interval covers with a probability of 1 - level; the p-value is two-sided.

    Raises:
        InputError: under two prompts, or no tokens.
    """
    return _ratio_of_totals([plain_s, chosen_tokens], [chosen_s, plain_tokens], strata=strata, level=level)


def _ratio_of_totals(
    tops: list[Sequence[float]],
    bottoms: list[Sequence[float]],
    *,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.05,
) -> tuple[Interval, float]:
    """Product of the totals in `tops` over that in `bottoms`, one entry per prompt, and the p-value of ratio 1."""
    from scipy import stats  # slow to import, and a look-up's forecast does without

    size = len(tops[0])
    if size < 2:
        raise InputError(f"an interval over {size} prompts: at least 2 are needed")
    totals = [sum(part) for part in tops + bottoms]
    if min(totals) <= 0.0:
        raise InputError("a ratio of nothing: there are no tokens or no seconds")
    log_ratio = sum(math.log(total) for total in totals[: len(tops)])
    log_ratio -= sum(math.log(total) for total in totals[len(tops) :])
    terms = numpy.zeros(size)
    for sign, parts in ((1.0, tops), (-1.0, bottoms)):
        for part in parts:
            terms += sign * numpy.asarray(part, float) / numpy.mean(part)
    error, freedom = _standard_error(terms, strata or [None] * size)
    reach = float(stats.t.ppf(1.0 - level / 2.0, freedom)) * error
    if error > 0.0:
        p_value = float(2.0 * stats.t.sf(abs(log_ratio) / error, freedom))
    else:
        p_value = 1.0 if log_ratio == 0.0 else 0.0
    ratio = math.exp(log_ratio)
    return Interval(estimate=ratio, low=ratio * math.exp(-reach), high=ratio * math.exp(reach)), p_value


def _standard_error(terms: numpy.ndarray, strata: Sequence[Hashable]) -> tuple[float, float]:
    """Standard error of the mean of `terms`, and degrees of freedom. Strata of one member are joined with another."""
    members: dict[Hashable, list[float]] = {}
    for stratum, term in zip(strata, terms.tolist(), strict=True):
        members.setdefault(stratum, []).append(term)
    groups = sorted(members.values(), key=len)
    while len(groups) > 1 and len(groups[0]) < 2:
        groups = sorted([groups[0] + groups[1], *groups[2:]], key=len)
    variances = [len(group) * float(numpy.var(group, ddof=1)) for group in groups]
    total = sum(variances)
    spread = sum(variance**2 / (len(group) - 1) for variance, group in zip(variances, groups, strict=True))
    return math.sqrt(total) / len(terms), total**2 / spread if spread > 0.0 else float(len(terms) - len(groups))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's step-down rejects at family-wise `level` (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def median(values: Iterable[float]) -> float:
    """The median; raises InputError on no values, because no data is never 0."""
    ordered = sorted(values)
    if not ordered:
        raise InputError("the median of no values")
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def share_interval(count: float, total: float) -> Interval:
    """A share with Wilson's 95 % interval (1927)."""
    share, square = count / total, Z_95 * Z_95
    centre = (count + square / 2.0) / (total + square)
    reach = Z_95 * math.sqrt(count * (1.0 - share) + square / 4.0) / (total + square)
    return Interval(estimate=share, low=min(share, max(0.0, centre - reach)), high=max(share, min(1.0, centre + reach)))


def calibration_error(confidences: numpy.ndarray, right: numpy.ndarray) -> float:
    """Expected calibration error: |share right - mean confidence| over ten equal bins, weighted by their sizes."""
    bins = numpy.minimum((confidences * 10).astype(int), 9)
    return float(numpy.abs(numpy.bincount(bins, weights=right - confidences)).sum() / len(right))


def calibration_interval(confidences: numpy.ndarray, right: numpy.ndarray, seed: int = 0) -> Interval:
    """The calibration error, which is above 0 by chance alone, with 95 % percentiles over resampled predictions."""
    draws = numpy.random.default_rng(seed).integers(0, len(right), (1000, len(right)))
    errors = [calibration_error(confidences[draw], right[draw]) for draw in draws]
    estimate, (low, high) = calibration_error(confidences, right), numpy.percentile(errors, [2.5, 97.5]).tolist()
    return Interval(estimate=estimate, low=min(low, estimate), high=max(high, estimate))
