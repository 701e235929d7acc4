"""Group-sequential tests: bounds as in the literature, p-values and intervals that hold for all looks together."""

import itertools
import math

import numpy
import pytest

from profiles.stats import LogRatio, holm
from tuner.search.sequential import Look, bounds, interval, next_look

MANY = 1e6  # degrees of freedom


def test_bounds_as_published() -> None:
    """O'Brien-Fleming-type spending, two-sided 5 %: Jennison and Turnbull (2000), and packages for these designs."""
    assert bounds([0.5, 1.0], 0.05) == pytest.approx([2.963, 1.969], abs=2e-3)
    assert bounds([1 / 3, 2 / 3, 1.0], 0.05) == pytest.approx([3.710, 2.511, 1.993], abs=1e-3)
    assert bounds([1.0], 0.05) == pytest.approx([1.960], abs=1e-3)


def _looks(rng: numpy.random.Generator, truth: float, fractions: tuple[float, ...], level: float) -> tuple[Look, ...]:
    """Looks until one rejects, at an error of 1 at the last."""
    steps = [math.sqrt(after - before) for before, after in itertools.pairwise((0.0, *fractions))]
    scores = numpy.cumsum([rng.normal(0.0, step) for step in steps])
    looks: tuple[Look, ...] = ()
    for fraction, score in zip(fractions, scores, strict=True):
        ratio = LogRatio(truth + score / fraction, 1.0 / math.sqrt(fraction), MANY)
        looks = (*looks, next_look(ratio, fraction, looks, is_last=fraction == 1.0))
        if looks[-1].p_value <= level:
            break
    return looks


def test_looking_thrice_costs_no_level() -> None:
    """Under the null 5 % of 2,000 proofs reject; looking thrice at plain intervals would reject 9 %."""
    rng = numpy.random.default_rng(1)
    proofs = [_looks(rng, 0.0, (0.4, 0.7, 1.0), 0.05) for _ in range(2000)]
    assert 0.04 <= sum(looks[-1].p_value <= 0.05 for looks in proofs) / 2000 <= 0.06


@pytest.mark.parametrize("truth", [0.0, 1.5, 3.0])
def test_intervals_after_stopping_cover(truth: float) -> None:
    """95 % of 1,000, also where a proof stops early because its estimate is high; they exclude 1 where it stopped."""
    rng = numpy.random.default_rng(2)
    proofs = [_looks(rng, truth, (0.4, 0.7, 1.0), 0.05) for _ in range(1000)]
    intervals = [interval(looks, 0.05) for looks in proofs]
    assert 0.935 <= sum(each.low <= math.exp(truth) <= each.high for each in intervals) / 1000 <= 0.965
    for looks, each in zip(proofs, intervals, strict=True):
        assert (looks[-1].p_value <= 0.05) == (each.low > 1.0 or each.high < 1.0)


@pytest.mark.parametrize(("truth", "level"), [(1.0, 0.05), (5.0, 0.01)])
def test_intervals_of_few_queues_cover(truth: float, level: float) -> None:
    """6 queues, then 12: each end misses in 2.5 % of 400, also where a gain of five errors is not rejected at first."""
    rng, missed = numpy.random.default_rng(3), numpy.zeros(2)
    for _ in range(400):
        queues = rng.normal(truth, math.sqrt(6), 12)
        looks: tuple[Look, ...] = ()
        for size in (6, 12):
            ratio = LogRatio(queues[:size].mean(), queues[:size].std(ddof=1) / math.sqrt(size), size - 1)
            looks = (*looks, next_look(ratio, 0.5, looks, is_last=size == 12))
            if looks[-1].p_value <= level:
                break
        measured = interval(looks, level)
        missed += math.log(measured.low) > truth, math.log(measured.high) < truth
    assert all(missed / 400 <= 0.05)


def test_a_p_value_is_the_level_that_just_rejects() -> None:
    """At each look the bound of that level is the look's z."""
    looks: tuple[Look, ...] = ()
    for value, fraction in ((1.0, 0.4), (1.9, 0.7), (2.2, 1.0)):
        looks = (
            *looks,
            next_look(LogRatio(value, 1 / math.sqrt(fraction), MANY), fraction, looks, is_last=fraction == 1),
        )
    level = looks[-1].p_value
    assert bounds([0.4, 0.7, 1.0], level)[-1] == pytest.approx(2.2, abs=1e-3)


def test_fractions_never_fall() -> None:
    """Whatever a look predicts; the last is 1."""
    looks: tuple[Look, ...] = ()
    for predicted, is_last in ((0.8, False), (0.6, False), (0.7, True)):
        looks = (*looks, next_look(LogRatio(0.1, 1.0, MANY), predicted, looks, is_last=is_last))
    fractions = [look.fraction for look in looks]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == 3
    assert fractions[-1] == 1.0


def test_a_rejected_row_hands_on_its_share() -> None:
    """A p-value of 0.04 passes Holm beside a rejected row, and not beside one that is not."""
    assert holm([0.001, 0.04]) == [True, True]
    assert holm([0.5, 0.04]) == [False, False]
