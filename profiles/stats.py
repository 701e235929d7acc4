"""Statistics of timed runs: ratios of totals with intervals, Holm's step-down, the median."""

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy

from profiles.records.core import Interval
from profiles.records.errors import InputError

MAX_LEVERAGE = 0.9  # a share near 1 would make an error without bound
Z_95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


class LogRatio(NamedTuple):
    """The log of a ratio of totals, its standard error and the degrees of freedom of that error."""

    value: float
    error: float
    freedom: float

    def interval(self, level: float = 0.05) -> Interval:
        """The ratio with a t interval that covers with a probability of 1 - `level`."""
        from scipy.special import stdtrit  # slow to import, and a look-up's forecast does without

        reach = float(stdtrit(self.freedom, 1.0 - level / 2.0)) * self.error
        low, estimate, high = (math.exp(self.value + shift) for shift in (-reach, 0.0, reach))
        return Interval(estimate=estimate, low=low, high=high)

    def p_value(self) -> float:
        """Two-sided, of a ratio of 1."""
        from scipy.special import stdtr

        if self.error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        return float(2.0 * stdtr(self.freedom, -abs(self.value) / self.error))


class Linearised(NamedTuple):
    """A log ratio of totals whose error is the mean of `terms`, one per prompt (Cochran 1977, 6.3).

    A prompt with a large share of a total pulls the ratio towards itself, so its term is divided by 1 - share, relative
    to one of an equal share (HC3; MacKinnon and White 1985).
    """

    value: float
    terms: numpy.ndarray

    @classmethod
    def of(cls, tops: Sequence[Sequence[float]], bottoms: Sequence[Sequence[float]]) -> "Linearised":
        """Product of the totals of `tops` over those of `bottoms`. Raises InputError where a total is not above 0."""
        parts = numpy.array((*tops, *bottoms), float)
        totals = parts.sum(axis=1)
        if totals.size == 0 or totals.min() <= 0.0:
            raise InputError("a ratio of nothing: there are no tokens or no seconds")
        shares = parts / totals[:, None]
        signs, size = numpy.array([1.0] * len(tops) + [-1.0] * len(bottoms)), parts.shape[1]
        leverages = numpy.minimum(shares.max(axis=0), MAX_LEVERAGE)
        terms = signs @ shares * (size - 1) / (1.0 - leverages)
        return cls(float(signs @ numpy.log(totals)), terms)


def rate_interval(seconds: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Tokens per second over prompts: ratio of totals, 95 % t interval of the linearised ratio.

    Raises InputError under two prompts or without a token.
    """
    return log_ratio(Linearised.of([tokens], [seconds])).interval()


def speedup_interval(
    plain_s: Sequence[float],
    plain_tokens: Sequence[int],
    chosen_s: Sequence[float],
    chosen_tokens: Sequence[int],
    *,
    strata: Sequence[Hashable] | None = None,
) -> tuple[Interval, float]:
    """Plain seconds per token over chosen seconds per token, paired by prompt, and the p-value of "equal".

    A t interval of the log of the ratio of totals: a percentile bootstrap of few prompts covers too seldom.

    Args:
        strata: the domain of each prompt, where each has a fixed share; see `log_ratio`.

    Raises:
        InputError: under two prompts, or no tokens.
    """
    ratio = log_ratio(Linearised.of([plain_s, chosen_tokens], [chosen_s, plain_tokens]), strata)
    return ratio.interval(), ratio.p_value()


def log_ratio(measured: Linearised, strata: Sequence[Hashable] | None = None) -> LogRatio:
    """The log ratio with its error; with strata only what varies within them is uncertain (Cochran 1977, 6.11).

    Raises InputError under two prompts.
    """
    size = len(measured.terms)
    return _log_ratio(measured.value, [_variance(measured.terms / size, strata or [None] * size)])


def assisted_log_ratio(
    measured: Linearised,
    forecast_s: tuple[Sequence[float], Sequence[float]],
    weight: float,
    strata: Sequence[Hashable] | None = None,
) -> LogRatio:
    """What n prompts measured, corrected by the forecasts of N prompts of which they are the first n.

    Double sampling (Cochran 1977, 12.6), also called prediction-powered inference (Angelopoulos et al. 2023): the mean
    of the weighted forecasts over all N, plus the mean of measured less weighted forecast over the n. With the terms f
    of the forecasts and r = measured - w f, the variance is w^2 S_f^2 / N + S_r^2 / n + 2 w S_fr / N within strata. It
    is added up by what each prompt contributes: w f / N + r / n where it was timed, w f / N where not.

    Args:
        forecast_s: seconds of plain decoding and of the setup, of all N prompts.
        weight: w from 0 (forecasts are ignored) to 1, which must not depend on these prompts.
        strata: of all N prompts.
    """
    timed, traced = len(measured.terms), len(forecast_s[0])
    strata = strata or [None] * traced
    overall, of_timed = (Linearised.of(*([part[:size]] for part in forecast_s)) for size in (traced, timed))
    expected = weight * overall.terms
    timed_part = _variance(expected[:timed] / traced + (measured.terms - expected[:timed]) / timed, strata[:timed])
    untimed, share = _variance(expected / traced, strata), 1.0 - timed / traced
    parts = [timed_part, _Variance(share * untimed.variance, share**2 * untimed.spread, 0)]
    return _log_ratio(measured.value + weight * (overall.value - of_timed.value), parts)


def regression_slope(
    measured: numpy.ndarray, forecast: numpy.ndarray, strata: Sequence[Hashable] | None = None
) -> float:
    """The weight that makes `assisted_log_ratio` most precise: the slope within strata, cut to 0 to 1."""
    x, y = (centred(terms, strata or [None] * len(measured)) for terms in (forecast, measured))
    square = float(x @ x)
    return min(1.0, max(0.0, float(x @ y) / square)) if square > 0.0 else 0.0


class TwoWay(NamedTuple):
    """A log ratio over pairs that share prompts and queues, and the parts of its variance."""

    ratio: LogRatio
    of_prompts: float
    of_queues: float
    of_pairs: float


def two_way_log_ratio(
    measured: Linearised,
    prompts: Sequence[Hashable],
    queues: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
) -> TwoWay:
    """A log ratio over pairs of runs, which are alike within a prompt and within a queue.

    V_prompt + V_queue - V_pair (Cameron, Gelbach, Miller 2011), but not less than either alone: few queues estimate
    theirs badly. Raises InputError under two prompts or queues.
    """
    size = len(measured.terms)
    shares = centred(measured.terms, strata or [None] * size) / size
    variances, freedoms = [], []
    for groups in (prompts, queues, range(size)):
        codes = {group: code for code, group in enumerate(dict.fromkeys(groups))}
        sums = numpy.bincount([codes[group] for group in groups], weights=shares)
        if len(sums) < 2:
            raise InputError(f"an interval over {len(sums)} prompts or queues: at least 2 are needed")
        freedoms.append(len(sums) - 1)
        variances.append(float(sums @ sums) * len(sums) / (len(sums) - 1))
    of_prompts, of_queues, of_pairs = variances
    variance = max(of_prompts + of_queues - of_pairs, of_prompts, of_queues)
    spread = of_prompts**2 / freedoms[0] + of_queues**2 / freedoms[1]
    freedom = max(variance**2 / spread, min(freedoms)) if spread > 0.0 else min(freedoms)
    return TwoWay(LogRatio(measured.value, math.sqrt(variance), freedom), of_prompts, of_queues, of_pairs)


class _Variance(NamedTuple):
    """Variance of a sum, and what its degrees of freedom come from (Satterthwaite 1946)."""

    variance: float
    spread: float
    freedom: int


def _log_ratio(value: float, parts: Sequence[_Variance]) -> LogRatio:
    variance, spread = (sum(part[index] for part in parts) for index in (0, 1))
    freedom = variance**2 / spread if spread > 0.0 else float(sum(part.freedom for part in parts))
    return LogRatio(value, math.sqrt(variance), freedom)


def _variance(contributions: numpy.ndarray, strata: Sequence[Hashable]) -> _Variance:
    """Of the sum of `contributions`, from what varies within strata."""
    groups = [contributions[members] for members in strata_members(strata)]
    if len(contributions) < 2:
        raise InputError(f"an interval over {len(contributions)} prompts: at least 2 are needed")
    variances = [len(group) * float(numpy.var(group, ddof=1)) for group in groups]
    spread = sum(variance**2 / (len(group) - 1) for variance, group in zip(variances, groups, strict=True))
    return _Variance(sum(variances), spread, len(contributions) - len(groups))


def centred(terms: numpy.ndarray, strata: Sequence[Hashable]) -> numpy.ndarray:
    """The terms less the mean of their stratum."""
    result = numpy.array(terms, float)
    for members in strata_members(strata):
        result[members] -= result[members].mean()
    return result


def strata_members(strata: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each stratum, the smallest first; strata of one member are joined with another."""
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    groups = sorted(members.values(), key=len)
    while len(groups) > 1 and len(groups[0]) < 2:
        groups = sorted([groups[0] + groups[1], *groups[2:]], key=len)
    return groups


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
    data = list(values)
    if not data:
        raise InputError("the median of no values")
    return statistics.median(data)


def median_interval(values: Sequence[float]) -> Interval:
    """The median with an interval of order statistics that covers at least 95 %, whatever the outliers.

    Raises InputError under six values.
    """
    from scipy.stats import binom

    ordered, rank = sorted(values), int(binom.ppf(0.025, len(values), 0.5))
    if rank < 1:
        raise InputError(f"an interval of the median of {len(values)} values: at least 6 are needed")
    return Interval(estimate=median(ordered), low=ordered[rank - 1], high=ordered[-rank])


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
