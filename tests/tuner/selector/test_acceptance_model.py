"""What rounds teach about a draft: positions behind a rejection stay unseen, old rounds fade, surprises count."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.policies import kept
from tuner.selector.acceptance_model import HALF_LIFE, PRIOR_ROUNDS, WINDOW, AcceptanceModel
from tuner.selector.loss_budget import LEAST_SHARE, MOST, RESERVE, LossBudget
from tuner.selector.loss_budget import WINDOW as LEDGER_WINDOW
from tuner.selector.operating_point import PLAIN_SHARE, SHARE, Pace

LENGTHS = tuple(range(1, 9))


def played(acceptance_model: AcceptanceModel, shares: list[float], rounds: int, length: int = 8, seed: int = 0) -> None:
    """Rounds of this length in which position i is kept with the i-th share."""
    luck = random.Random(seed)
    for now in range(1, rounds + 1):
        accepted = next((place for place in range(length) if luck.random() > shares[place]), length)
        acceptance_model.observe(((length, accepted),), length - 1, now)
        acceptance_model.settle()


def mean_tokens(shares: list[float], length: int) -> float:
    survived, tokens = 1.0, 1.0
    for share in shares[:length]:
        survived *= share
        tokens += survived
    return tokens


def test_it_starts_at_what_was_measured() -> None:
    """Also where the walk at a length differs from what the shares of the longest rounds give."""
    assert AcceptanceModel(kept(0, 0.8, hit=0.5), LENGTHS).tokens == pytest.approx(kept(0, 0.8, hit=0.5).per_round)


def test_what_is_behind_a_rejection_does_not_bias() -> None:
    """After many rounds every length has its true mean, though deep positions were seldom seen."""
    shares = [0.9, 0.5, 0.8, 0.3, 0.6, 0.7, 0.9, 0.2]
    acceptance_model = AcceptanceModel(kept(0, 0.6), LENGTHS)
    played(acceptance_model, shares, 8000)
    for length in LENGTHS:
        assert acceptance_model.tokens[length - 1] == pytest.approx(mean_tokens(shares, length), rel=0.06)


def test_short_rounds_teach_nothing_about_long_ones() -> None:
    """Positions that were not proposed stay at the stored shares."""
    acceptance_model = AcceptanceModel(kept(0, 0.6), LENGTHS)
    played(acceptance_model, [0.95, 0.95], 500, length=2)
    survived = (acceptance_model.tokens[1] - acceptance_model.tokens[0]) * 0.6
    assert acceptance_model.tokens[2] - acceptance_model.tokens[1] == pytest.approx(survived, rel=1e-6)


def test_what_was_seen_fades() -> None:
    """After a half-life it weighs half; after many the stored figures are back, and a tiny scale did no harm."""
    acceptance_model = AcceptanceModel(kept(0, 0.6), LENGTHS)
    played(acceptance_model, [0.65] * 8, 200)
    seen = acceptance_model.weight - PRIOR_ROUNDS
    acceptance_model.forget(200 + int(HALF_LIFE))
    assert acceptance_model.weight - PRIOR_ROUNDS == pytest.approx(seen / 2, rel=1e-6)
    acceptance_model.forget(200 + int(200 * HALF_LIFE))
    acceptance_model.settle()
    assert acceptance_model.tokens == pytest.approx(kept(0, 0.6).per_round)


@pytest.mark.parametrize(("share", "rounds"), [(0.0, 40), (1.0, 40)])
def test_a_surprise_starts_over(share: float, rounds: int) -> None:
    """Nothing kept any more, or everything: within forty rounds the figures are near the new truth."""
    acceptance_model = AcceptanceModel(kept(0, 0.6), LENGTHS)
    played(acceptance_model, [0.6] * 8, 2000)
    for now in range(2001, 2001 + rounds):
        acceptance_model.observe(((8, 8 if share else 0),), 7, now)
        acceptance_model.settle()
    assert acceptance_model.tokens[7] > 5.0 if share else acceptance_model.tokens[7] < 1.7
    assert acceptance_model.weight < 4 * WINDOW


def test_beliefs_go_through_json() -> None:
    """What is restored goes on alike."""
    first, second = AcceptanceModel(kept(0, 0.6), LENGTHS), AcceptanceModel(kept(0, 0.6), LENGTHS)
    played(first, [0.8] * 8, 300)
    second.restore(json.loads(json.dumps(first.snapshot())))
    for acceptance_model in (first, second):
        acceptance_model.observe(((8, 3), (8, 0)), 7, 301)
        acceptance_model.settle()
    assert first.tokens == second.tokens


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=60))
def test_the_ledger_knows_the_worst_stretch(lost: list[float]) -> None:
    """Its loss is the largest sum over the latest 0, 1, ... rounds."""
    loss_budget = LossBudget()
    for number, one in enumerate(lost):
        loss_budget.add(one)
        latest = lost[: number + 1]
        worst = max(sum(latest[first:]) for first in range(len(latest) + 1))
        assert loss_budget.loss == pytest.approx(worst, abs=1e-9)


def test_losses_leave_the_window() -> None:
    """After 1,000 rounds that break even they are forgotten, not before."""
    loss_budget = LossBudget()
    for _ in range(5):
        loss_budget.add(2.0)
    for _ in range(LEDGER_WINDOW - 5):
        loss_budget.add(0.0)
    assert loss_budget.loss == 10.0
    loss_budget.add(0.0)
    assert loss_budget.loss == 8.0


def test_less_may_be_risked_the_less_is_left() -> None:
    """A quarter of what is left; what gains nothing may use 0.7 of the whole."""
    loss_budget = LossBudget()
    assert loss_budget.allowed() == MOST / RESERVE
    assert loss_budget.allowed(0.0) == pytest.approx(LEAST_SHARE * MOST / RESERVE)
    loss_budget.add(6.0)
    assert loss_budget.allowed() == (MOST - 6.0) / RESERVE
    loss_budget.charge(2.0)
    assert loss_budget.allowed() == (MOST - 8.0) / RESERVE


def test_a_pace_follows_and_is_not_thrown_off() -> None:
    """Towards what it hears; one round of ten times as long moves it by little, three in a row all the way."""
    pace = Pace(SHARE)
    for now in range(60):
        assert not pace.hear(1.1, now, 1.0)
    assert pace.factor == pytest.approx(1.1, rel=0.03)
    assert not pace.hear(11.0, 61, 1.0)
    assert pace.factor < 1.15
    assert not pace.hear(1.1, 62, 1.0)
    assert [pace.hear(3.0, now, 1.0) for now in (63, 64, 65)] == [False, False, True]
    for now in range(66, 70):
        pace.hear(3.0, now, 1.0)
    assert pace.factor == pytest.approx(3.0, rel=0.15)
    assert pace.low < pace.factor


def test_plain_decoding_s_pace_is_averaged_longer() -> None:
    """The same noise moves it less."""
    luck, spread = random.Random(1), []
    for share in (SHARE, PLAIN_SHARE):
        pace, heard = Pace(share), []
        for now in range(2000):
            pace.hear(luck.lognormvariate(0.0, 0.05), now, 1.0)
            heard.append(pace.factor)
        spread.append(max(heard[500:]) - min(heard[500:]))
    assert spread[1] < spread[0] / 1.5
