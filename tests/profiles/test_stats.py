"""Variances by hand and by simulation: double sampling, two-way clusters, strata."""

import math

import numpy
import pytest

from profiles.stats import Linearised, LogRatio, assisted_log_ratio, log_ratio, regression_slope, two_way_log_ratio

TRACED, TIMED = 120, 24


def _columns(rng: numpy.random.Generator, size: int, spread: float, residual: float) -> tuple[numpy.ndarray, ...]:
    """Seconds of plain decoding, of the setup as measured, and of the setup as forecast."""
    gains = rng.normal(math.log(1.2) + spread**2 / 2.0, spread, size)
    plain = numpy.exp(rng.normal(0.0, 0.3, size))
    return plain, plain * numpy.exp(-gains - rng.normal(0.0, residual, size)), plain * numpy.exp(-gains)


def _estimates(plain: numpy.ndarray, chosen: numpy.ndarray, forecast: numpy.ndarray, weight: float) -> LogRatio:
    measured = Linearised.of([plain[:TIMED]], [chosen[:TIMED]])
    return assisted_log_ratio(measured, (plain.tolist(), forecast.tolist()), weight)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_error_of_double_sampling_is_what_estimates_vary_by(weight: float) -> None:
    """Over 400 samples; with weight 1 it is much smaller than that of the timed prompts alone."""
    rng = numpy.random.default_rng(1)
    ratios = [_estimates(*_columns(rng, TRACED, 0.2, 0.03), weight) for _ in range(400)]
    spread = float(numpy.std([ratio.value for ratio in ratios]))
    assert numpy.mean([ratio.error for ratio in ratios]) == pytest.approx(spread, rel=0.1)
    assert numpy.mean([ratio.value for ratio in ratios]) == pytest.approx(math.log(1.2), abs=4 * spread / 20)
    assert spread == pytest.approx({0.0: 0.041, 0.5: 0.026, 1.0: 0.019}[weight], rel=0.12)


def test_double_sampling_by_its_formula() -> None:
    """w^2 S_f^2 / N + S_r^2 / n + 2 w S_fr / N, where the timed prompts are like all of them."""
    plain, chosen, forecast = (numpy.tile(part, 5) for part in _columns(numpy.random.default_rng(2), TIMED, 0.2, 0.1))
    f = Linearised.of([plain], [forecast]).terms[:TIMED]
    r = Linearised.of([plain[:TIMED]], [chosen[:TIMED]]).terms - 0.7 * f
    expected = 0.7**2 * f.var() / TRACED + r.var() / TIMED + 2 * 0.7 * numpy.mean(f * (r - r.mean())) / TRACED
    assert _estimates(plain, chosen, forecast, 0.7).error == pytest.approx(math.sqrt(expected), rel=0.03)


def test_without_weight_or_further_prompts_forecasts_change_nothing() -> None:
    """The plain interval is left."""
    plain, chosen, forecast = _columns(numpy.random.default_rng(3), TRACED, 0.2, 0.1)
    alone = log_ratio(Linearised.of([plain[:TIMED]], [chosen[:TIMED]]))
    assert _estimates(plain, chosen, forecast, 0.0) == pytest.approx(alone)
    everything = Linearised.of([plain], [chosen])
    assert assisted_log_ratio(everything, (plain.tolist(), forecast.tolist()), 0.8) == pytest.approx(
        log_ratio(everything)
    )


def test_the_weight_is_the_slope_within_domains() -> None:
    """A forecast that tells domains apart and nothing else gets weight 0, half of the truth gets 1."""
    terms = numpy.array([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
    domains = ["a", "a", "a", "b", "b", "b"]
    assert regression_slope(terms, 0.5 * terms, domains) == 1.0
    assert regression_slope(terms, 2.0 * terms, domains) == pytest.approx(0.5)
    assert regression_slope(terms, numpy.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]), domains) == 0.0
    assert regression_slope(terms, -terms, domains) == 0.0


@pytest.mark.parametrize(("of_prompt", "of_queue"), [(0.1, 0.1), (0.2, 0.0), (0.0, 0.1)])
def test_two_way_intervals_cover(of_prompt: float, of_queue: float) -> None:
    """12 queues that share 24 prompts: 95 % intervals cover in 93 to 99 % of 400 samples, whichever effect is there."""
    rng = numpy.random.default_rng(4)
    prompts, queues = numpy.arange(96) % 24, numpy.arange(96) // 8
    covered = 0
    for _ in range(400):
        gains = rng.normal(0.0, of_prompt, 24)[prompts] + rng.normal(0.0, of_queue, 12)[queues]
        seconds = numpy.exp(-gains - rng.normal(0.0, 0.05, 96))
        ratio = two_way_log_ratio(Linearised.of([numpy.ones(96)], [seconds]), prompts.tolist(), queues.tolist()).ratio
        truth = math.exp((of_prompt**2 + of_queue**2 + 0.05**2) / -2.0)  # of the mean of exp(-gain)
        interval = ratio.interval()
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / 400 <= 0.99
