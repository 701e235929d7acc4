"""Group-sequential tests: several looks at a growing sample, and one chance of a wrong rejection for all of them.

Two-sided, symmetric bounds from the O'Brien-Fleming-type spending function of Lan and DeMets (1983). Estimates of
successive looks have independent increments of information, so their z values correlate as sqrt(fraction / fraction).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from profiles.records.core import Interval
from profiles.stats import LogRatio

FARTHEST_Z = 8.0  # beyond this nothing happens
SMALLEST_P = 1e-15
MIN_STEP = 0.005  # of information between looks
_NODES, _WEIGHTS = numpy.polynomial.legendre.leggauss(48)


class Look(NamedTuple):
    """What one look estimates; `fraction` is its share of the information of the last look, whose share is 1.

    `p_value` is the smallest level at which this look or one before rejects a ratio of 1: it holds however often it was
    looked. Holm's step-down over such p-values is the procedure of Maurer and Bretz (2013): a row that is rejected
    hands on its share of the level, and a row that is not goes on to its next look.
    """

    ratio: LogRatio
    fraction: float
    p_value: float = 1.0

    @property
    def z(self) -> float:
        """The normal value as far out as the t value."""
        return min(FARTHEST_Z, -float(ndtri(self.ratio.p_value() / 2.0)))


def next_look(ratio: LogRatio, predicted: float, earlier: Sequence[Look], *, is_last: bool) -> Look:
    """The look after those before.

    Args:
        predicted: Var(last look) / Var(this look). The fraction is that, but grows from look to look, and is 1 at the
            last one.
    """
    before = earlier[-1].fraction if earlier else 0.0
    fraction = min(max(predicted, before + MIN_STEP), 1.0 - MIN_STEP / (1 + len(earlier)))
    look = Look(ratio, 1.0 if is_last else fraction)
    return look._replace(p_value=min([_p_value((*earlier, look)), *(each.p_value for each in earlier)]))


class _Paths(NamedTuple):
    """The score process at one look of those that no bound has stopped: points of a quadrature and their masses."""

    points: numpy.ndarray
    masses: numpy.ndarray
    fraction: float


_START = _Paths(numpy.zeros(1), numpy.ones(1), 0.0)


def _staying(paths: _Paths, fraction: float, low: float, high: float) -> _Paths:
    """The paths whose next z lies within (low, high), by Gauss-Legendre quadrature (Armitage et al. 1969)."""
    low, high = (max(-FARTHEST_Z, min(FARTHEST_Z, bound)) for bound in (low, high))
    root, step = math.sqrt(fraction), math.sqrt(fraction - paths.fraction)
    points = root * (0.5 * (high + low) + 0.5 * (high - low) * _NODES)
    density = numpy.exp(-0.5 * ((points[:, None] - paths.points) / step) ** 2) @ paths.masses
    masses = 0.5 * root * (high - low) * _WEIGHTS * density / (step * math.sqrt(2.0 * math.pi))
    return _Paths(points, masses, fraction)


def _above(paths: _Paths, fraction: float, z: float) -> float:
    """The chance that a path goes on to a z above the given one."""
    step = math.sqrt(fraction - paths.fraction)
    return float(ndtr((paths.points - z * math.sqrt(fraction)) / step) @ paths.masses)


def _spent(level: float, fraction: float) -> float:
    """The part of a two-sided level that is spent up to an information fraction, half of it on each side."""
    return float(4.0 * ndtr(ndtri(level / 4.0) / math.sqrt(fraction))) if fraction > 0.0 else 0.0


def _walk(fractions: Sequence[float], level: float) -> tuple[list[float], _Paths]:
    """The bound on |z| at each look, and the paths that stay within all of them."""
    paths, bounds = _START, list[float]()
    for before, fraction in itertools.pairwise((0.0, *fractions)):
        half = (_spent(level, fraction) - _spent(level, before)) / 2.0
        start = paths

        def excess(z: float, start: _Paths = start, fraction: float = fraction, half: float = half) -> float:
            return _above(start, fraction, z) - half

        bound = FARTHEST_Z
        if not bounds:
            bound = min(bound, -float(ndtri(half)))
        elif excess(FARTHEST_Z) < 0.0:
            bound = float(brentq(excess, 0.0, FARTHEST_Z, xtol=1e-6))
        bounds.append(bound)
        paths = _staying(paths, fraction, -bound, bound)
    return bounds, paths


def bounds(fractions: Sequence[float], level: float) -> list[float]:
    """The |z| that rejects at each look, so that the chance to reach any of them by chance is `level`."""
    return _walk(fractions, level)[0]


def _p_value(looks: Sequence[Look]) -> float:
    """The level whose bound at the last of these looks is its z."""
    *earlier, last = looks
    fractions = [look.fraction for look in earlier]
    if not earlier:
        level = 4.0 * ndtr(ndtri(ndtr(-last.z) / 2.0) * math.sqrt(last.fraction))
        return min(1.0, max(SMALLEST_P, float(level)))

    def excess(log_level: float) -> float:
        level = math.exp(log_level)
        increment = _spent(level, last.fraction) - _spent(level, fractions[-1])
        return increment - 2.0 * _above(_walk(fractions, level)[1], last.fraction, last.z)

    low, high = math.log(SMALLEST_P), math.log(0.99)
    if excess(high) < 0.0:
        return 1.0
    return SMALLEST_P if excess(low) >= 0.0 else math.exp(float(brentq(excess, low, high, xtol=1e-4)))


def _z(ratio: LogRatio, difference: float) -> float:
    """The normal value as far out as the t value of a difference from the truth."""
    quantile = float(stdtr(ratio.freedom, difference / ratio.error))
    return float(ndtri(min(1.0 - SMALLEST_P, max(SMALLEST_P, quantile))))


def interval(looks: Sequence[Look], level: float, *, coverage: float = 0.95) -> Interval:
    """The ratio with the interval of the stage-wise ordering (Tsiatis, Rosner, Mehta 1984), whose coverage is exact.

    An outcome counts as more extreme the earlier a bound was reached, and within a look by its z. With one look it is
    the t interval.

    Args:
        level: the two-sided level of the bounds that the earlier looks did not reach.
    """
    *earlier, last = looks
    ratio = last.ratio
    tail = (1.0 - coverage) / 2.0
    if not earlier or min(look.ratio.error for look in looks) == 0.0:
        return ratio.interval(1.0 - coverage)
    fractions = [look.fraction for look in earlier]
    limits = bounds(fractions, level)

    def above(truth: float) -> float:
        paths, reached = _START, 0.0
        for look, limit in zip(earlier, limits, strict=True):
            bound = -float(stdtrit(look.ratio.freedom, ndtr(-limit))) * look.ratio.error
            low, high = (_z(look.ratio, value - truth) for value in (-bound, bound))
            reached += _above(paths, look.fraction, high)
            paths = _staying(paths, look.fraction, low, high)
        return reached + _above(paths, last.fraction, _z(ratio, ratio.value - truth))

    reach = 2.0 * FARTHEST_Z * max(look.ratio.error for look in looks)
    around = ratio.value - reach, ratio.value + reach
    ends = [
        float(brentq(lambda truth, tail=tail: above(truth) - tail, *around, xtol=1e-3 * ratio.error))
        for tail in (tail, 1.0 - tail)
    ]
    low, high = min(ends[0], ratio.value), max(ends[1], ratio.value)
    return Interval(estimate=math.exp(ratio.value), low=math.exp(low), high=math.exp(high))
