"""Statistics of timed runs: paired ratios with intervals, Holm's step-down, the median."""

import math
from collections.abc import Iterable, Sequence

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
    plain_s: Sequence[float], plain_tokens: Sequence[int], chosen_s: Sequence[float], chosen_tokens: Sequence[int]
) -> tuple[Interval, float]:
    """Plain seconds per token / chosen seconds per token, paired by prompt, and the two-sided p-value of "equal".

    95 % t interval of the log of the ratio of totals, linearised over prompts: a percentile bootstrap of few prompts
    covers too seldom. Raises InputError under two prompts or without a token.
    """
    return _ratio_of_totals([plain_s, chosen_tokens], [chosen_s, plain_tokens])


def _ratio_of_totals(numerators: list[Sequence[float]], denominators: list[Sequence[float]]) -> tuple[Interval, float]:
    """Product of the totals of `numerators` over that of `denominators`, by prompt, and the p-value of ratio 1."""
    from scipy import stats  # slow to import, and a look-up does without

    size = len(numerators[0])
    if size < 2:
        raise InputError(f"an interval over {size} prompts: at least 2 are needed")
    totals = [sum(column) for column in numerators + denominators]
    if min(totals) <= 0.0:
        raise InputError("a ratio of nothing: there are no tokens or no seconds")
    log_ratio, terms = 0.0, numpy.zeros(size)
    for sign, columns in ((1.0, numerators), (-1.0, denominators)):
        for column in columns:
            log_ratio += sign * math.log(sum(column))
            terms += sign * numpy.asarray(column, float) / numpy.mean(column)
    error = float(numpy.std(terms, ddof=1) / math.sqrt(size))
    half_width = float(stats.t.ppf(0.975, size - 1)) * error
    if error > 0.0:
        p_value = float(2.0 * stats.t.sf(abs(log_ratio) / error, size - 1))
    else:
        p_value = 1.0 if log_ratio == 0.0 else 0.0
    ratio = math.exp(log_ratio)
    return Interval(estimate=ratio, low=ratio * math.exp(-half_width), high=ratio * math.exp(half_width)), p_value


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


def share_interval(count: int, total: int) -> Interval:
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
