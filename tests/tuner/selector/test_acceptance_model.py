"""Acceptance, losses and round times learned from rounds."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.records.errors import InputError
from tests.support.policies import acceptance
from tuner.selector.acceptance_model import CHANGE_WINDOW, HALF_LIFE_ROUNDS, MAX_PRIOR_ROUNDS, AcceptanceModel
from tuner.selector.loss_budget import MAX_LOSS_SHARE, MIN_BUDGET_SHARE, RISK_DIVISOR, WINDOW, LossBudget
from tuner.selector.round_time import MIN_PLAIN_ROUND_WEIGHT, MIN_ROUND_WEIGHT, TimeFactor

LENGTHS = tuple(range(1, 9))


def play(model: AcceptanceModel, accept_probs: list[float], rounds: int, length: int = 8, seed: int = 0) -> None:
    """Rounds of this length in which position i is accepted with the i-th probability."""
    rng = random.Random(seed)
    for now in range(1, rounds + 1):
        accepted = next((position for position in range(length) if rng.random() > accept_probs[position]), length)
        model.observe(((length, accepted),), length - 1, now)
        model.update()


def mean_tokens(accept_probs: list[float], length: int) -> float:
    reached, tokens = 1.0, 1.0
    for accept_prob in accept_probs[:length]:
        reached *= accept_prob
        tokens += reached
    return tokens


def test_it_starts_at_what_was_measured() -> None:
    """Also where rounds of a length accept more or less than the probabilities of the longest rounds give."""
    stored = replace(acceptance(0, 0.8, propose_prob=0.5), mean_tokens=(1.3, 1.8, 2.0, 2.2, 2.3, 2.4, 2.5, 2.6))
    assert AcceptanceModel(stored, LENGTHS).mean_tokens == pytest.approx(stored.mean_tokens)


def test_what_is_behind_a_rejection_does_not_bias() -> None:
    """After many rounds every length has its true mean, though deep positions were seldom tested."""
    accept_probs = [0.9, 0.5, 0.8, 0.3, 0.6, 0.7, 0.9, 0.2]
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, accept_probs, 8000)
    for length in LENGTHS:
        assert model.mean_tokens[length - 1] == pytest.approx(mean_tokens(accept_probs, length), rel=0.06)


def test_short_rounds_teach_nothing_about_long_ones() -> None:
    """Positions that were not proposed stay at the stored probabilities."""
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, [0.95, 0.95], 500, length=2)
    reached = (model.mean_tokens[1] - model.mean_tokens[0]) * 0.6
    assert model.mean_tokens[2] - model.mean_tokens[1] == pytest.approx(reached, rel=1e-6)


def test_rounds_decay() -> None:
    """After a half-life they weigh half; after many the stored figures are back, and a tiny scale did no harm."""
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, [0.65] * 8, 200)
    learned = model.weight - MAX_PRIOR_ROUNDS
    model.decay(200 + int(HALF_LIFE_ROUNDS))
    assert model.weight - MAX_PRIOR_ROUNDS == pytest.approx(learned / 2, rel=1e-6)
    model.decay(200 + int(200 * HALF_LIFE_ROUNDS))
    model.update()
    assert model.mean_tokens == pytest.approx(acceptance(0, 0.6).mean_tokens)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_change_of_acceptance_restarts(accepts: bool) -> None:
    """Nothing accepted any more, or everything: within forty rounds the figures are near the new truth."""
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, [0.6] * 8, 2000)
    for now in range(2001, 2041):
        model.observe(((8, 8 if accepts else 0),), 7, now)
        model.update()
    assert model.mean_tokens[7] > 5.0 if accepts else model.mean_tokens[7] < 1.7
    assert model.weight < 4 * CHANGE_WINDOW


def test_acceptance_goes_through_json() -> None:
    """What is restored goes on alike."""
    first, second = (AcceptanceModel(acceptance(0, 0.6), LENGTHS) for _ in range(2))
    play(first, [0.8] * 8, 300)
    second.restore(json.loads(json.dumps(first.snapshot())))
    for model in (first, second):
        model.observe(((8, 3), (8, 0)), 7, 301)
        model.update()
    assert first.mean_tokens == second.mean_tokens


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=60))
def test_the_loss_is_that_of_the_worst_stretch(losses: list[float]) -> None:
    """The largest sum over the latest 0, 1, ... rounds."""
    budget = LossBudget()
    for number, loss in enumerate(losses):
        budget.add(loss)
        latest = losses[: number + 1]
        worst = max(sum(latest[first:]) for first in range(len(latest) + 1))
        assert budget.loss == pytest.approx(worst, abs=1e-9)


def test_losses_leave_the_window() -> None:
    """After 1,000 rounds that break even they are forgotten, not before."""
    budget = LossBudget()
    for _ in range(5):
        budget.add(2.0)
    for _ in range(WINDOW - 5):
        budget.add(0.0)
    assert budget.loss == 10.0
    budget.add(0.0)
    assert budget.loss == 8.0


def test_less_may_be_risked_the_less_is_left() -> None:
    """A quarter of what is left; what gains nothing may use 0.7 of the whole."""
    budget, max_loss = LossBudget(), MAX_LOSS_SHARE * WINDOW
    assert budget.allowed() == max_loss / RISK_DIVISOR
    assert budget.allowed(0.0) == pytest.approx(MIN_BUDGET_SHARE * max_loss / RISK_DIVISOR)
    budget.add(6.0)
    assert budget.allowed() == (max_loss - 6.0) / RISK_DIVISOR
    assert budget.left() == max_loss - 6.0
    assert LossBudget(3000).left() == 3 * max_loss
    with pytest.raises(InputError, match="loss window of 0 rounds: at least 1 is needed"):
        LossBudget(0)


def test_a_time_factor_follows_and_is_not_thrown_off() -> None:
    """Towards what it observes; one round of ten times as long moves it by little, three in a row all the way."""
    factor = TimeFactor(MIN_ROUND_WEIGHT)
    for now in range(60):
        assert not factor.observe(1.1, now, expected=1.0)
    assert factor.value == pytest.approx(1.1, rel=0.03)
    assert not factor.observe(11.0, 61, expected=1.0)
    assert factor.value < 1.15
    assert not factor.observe(1.1, 62, expected=1.0)
    assert [factor.observe(3.0, now, expected=1.0) for now in (63, 64, 65)] == [False, False, True]
    for now in range(66, 70):
        factor.observe(3.0, now, expected=1.0)
    assert factor.value == pytest.approx(3.0, rel=0.15)
    assert factor.low < factor.value


def test_two_spikes_and_an_ordinary_round_are_no_jump() -> None:
    """A jump goes only as far as the smallest of its three rounds."""
    factor = TimeFactor(MIN_PLAIN_ROUND_WEIGHT)
    for now in range(100):
        factor.observe(1.0, now, expected=1.0)
    for now, ratio in enumerate((1.25, 20.0, 20.0), 100):
        factor.observe(ratio, now, expected=1.0)
    assert factor.value < 1.25


def test_plain_decoding_is_averaged_longer() -> None:
    """The same noise moves its factor less."""
    rng, spread = random.Random(1), []
    for weight in (MIN_ROUND_WEIGHT, MIN_PLAIN_ROUND_WEIGHT):
        factor, values = TimeFactor(weight), []
        for now in range(2000):
            factor.observe(rng.lognormvariate(0.0, 0.05), now, expected=1.0)
            values.append(factor.value)
        spread.append(max(values[500:]) - min(values[500:]))
    assert spread[1] < spread[0] / 1.5
