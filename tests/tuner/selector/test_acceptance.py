"""Acceptance, domains of requests, losses and round times learned from rounds."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.records.errors import InputError
from tests.support.policies import acceptance, learning_policy
from tuner.policy.query import MIXED
from tuner.selector.acceptance import HALF_LIFE_ROUNDS, REJECTED, AcceptanceModel, Domains
from tuner.selector.loss_budget import RESERVE, RISK_DIVISOR, LossBudget
from tuner.selector.round_time import RoundTimeModel

LENGTHS = tuple(range(1, 9))


def play(model: AcceptanceModel, accept_probs: list[float], rounds: int, length: int = 8, seed: int = 0) -> None:
    """Rounds of this length in which position i is accepted with the i-th probability."""
    rng = random.Random(seed)
    for now in range(1, rounds + 1):
        accepted = next((position for position in range(length) if rng.random() > accept_probs[position]), length)
        model.observe(length, accepted, 1.0, now)
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
    assert AcceptanceModel(stored, LENGTHS).tokens == pytest.approx(stored.mean_tokens)


def test_what_is_run_replaces_what_was_measured_of_a_length() -> None:
    """Rounds of 4 accept more than the longest ones by the stored figures; once they are run, as many as they do."""
    stored = acceptance(0, 0.5)
    stored = replace(
        stored,
        mean_tokens=tuple(1.3 * (tokens - 1.0) + 1.0 for tokens in stored.mean_tokens[:4]) + stored.mean_tokens[4:],
    )
    model = AcceptanceModel(stored, LENGTHS)
    assert model.tokens == pytest.approx(stored.mean_tokens)
    play(model, [0.7] * 4, 4000, length=4)
    assert model.tokens[3] == pytest.approx(mean_tokens([0.7] * 4, 4), rel=0.03)
    assert model.tokens[1] == pytest.approx(mean_tokens([0.7] * 4, 2), rel=0.03)  # is off as rounds of 4 are
    deeper = mean_tokens([0.7] * 4 + [0.5] * 4, 8) - 1.0
    assert model.tokens[7] == pytest.approx(1.0 + deeper / 1.3, rel=0.03)


def test_what_is_behind_a_rejection_does_not_bias() -> None:
    """After many rounds every length has its true mean, though deep positions were seldom tested."""
    accept_probs = [0.9, 0.5, 0.8, 0.3, 0.6, 0.7, 0.9, 0.2]
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, accept_probs, 8000)
    for length in LENGTHS:
        assert model.tokens[length - 1] == pytest.approx(mean_tokens(accept_probs, length), rel=0.06)


def test_short_rounds_teach_nothing_about_long_ones() -> None:
    """Positions that were not proposed stay at the stored probabilities."""
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, [0.95, 0.95], 500, length=2)
    reached = (model.tokens[1] - model.tokens[0]) * 0.6
    assert model.tokens[2] - model.tokens[1] == pytest.approx(reached, rel=1e-6)


def test_rounds_decay_by_those_of_their_domain() -> None:
    """After a half-life of the domain's own rounds they weigh half; after many the stored figures are back."""
    model = AcceptanceModel(acceptance(0, 0.6), LENGTHS)
    play(model, [0.9] * 8, 200)
    learned, error = model.tokens[7], model.error(7, 200.0)
    model.decay(200 + HALF_LIFE_ROUNDS)
    model.update()
    assert acceptance(0, 0.6).mean_tokens[7] < model.tokens[7] < learned
    assert model.error(7, 200 + HALF_LIFE_ROUNDS) > error
    model.decay(200 + 40 * HALF_LIFE_ROUNDS)
    model.update()
    assert model.tokens == pytest.approx(acceptance(0, 0.6).mean_tokens)


def domains() -> Domains:
    prior = learning_policy().prior
    assert prior is not None
    return Domains(prior)


def test_a_request_tells_its_domain() -> None:
    """Without a label a few rounds of a draft that does better on code show that the text is code."""
    mixture = domains()
    code = mixture.names.index("code")
    draft, text = mixture.drafts[0.0][1], mixture.start(None)
    weights, _ = text
    assert 0.1 < weights[code] < weights[mixture.names.index(MIXED)]
    assert [mixture.learn(text, draft, (4, 4)) for _ in range(12)][-1] == code
    assert weights[code] > 0.8
    for _ in range(20):
        mixture.learn(text, draft, (4, 0))
    assert weights[mixture.names.index(REJECTED)] > 0.8


def test_what_is_under_a_label_is_learned() -> None:
    """A request starts at its label's domain; where requests under it are of another, later ones start there."""
    mixture = domains()
    code = mixture.names.index("code")
    assert mixture.shares[mixture.labels["code"]][code] > 0.85
    rng = random.Random(0)
    for _ in range(60):
        text = mixture.start(None)
        for _ in range(20):
            accepted = next((position for position in range(4) if rng.random() > 0.8), 4)
            mixture.learn(text, mixture.drafts[0.0][1], (4, accepted))
        mixture.finish(text)
    assert mixture.start(None)[0][code] > 0.6
    assert sum(mixture.start(None)[0]) == pytest.approx(1.0)


def test_requests_that_repeat_their_domain() -> None:
    """Where one is mostly like the one before, the next starts there; where domains take turns, at their shares."""
    starts = []
    for length in (10, 1):
        mixture = domains()
        of_domain = [[float(name == domain) for name in mixture.names] for domain in ("mixed", "code")]
        for number in range(40 * length):
            mixture.finish((of_domain[number // length % 2], 0))
        starts.append(mixture.start(None)[0][mixture.names.index("code")])
    assert starts[0] > 0.8
    assert starts[1] == pytest.approx(0.5, abs=0.1)


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=60))
def test_the_loss_is_that_of_the_worst_stretch(losses: list[float]) -> None:
    """The largest sum over the latest 0, 1, ... rounds."""
    budget = LossBudget(0.98, 1000)
    for number, loss in enumerate(losses):
        budget.add(loss, 1.0)
        latest = losses[: number + 1]
        worst = max(sum(latest[first:]) for first in range(len(latest) + 1))
        assert budget.loss == pytest.approx(worst, abs=1e-9)


def test_losses_leave_the_window() -> None:
    """After as many rounds that break even they are forgotten, not before; what is left may be risked by a quarter."""
    budget = LossBudget(0.98, 1000)
    whole_s = RESERVE * 1000 * (1.0 / 0.98 - 1.0)
    assert budget.allowed_s(1.0) == pytest.approx(whole_s / RISK_DIVISOR)
    for _ in range(5):
        budget.add(2.0, 1.0)
    assert budget.allowed_s(1.0) == pytest.approx((whole_s - 10.0) / RISK_DIVISOR)
    for _ in range(995):
        budget.add(0.0, 1.0)
    assert budget.loss == 10.0
    assert budget.allowed_s(1.0) == pytest.approx((whole_s - 10.0) / RISK_DIVISOR)
    budget.add(0.0, 1.0)
    assert budget.loss == 8.0
    share = whole_s / 1000  # since the start 10 are lost, in 1,001 rounds
    assert budget.allowed_s(1.0) == pytest.approx((1001 * share - 10.0) / RISK_DIVISOR)
    assert LossBudget(None, 1000).allowed_s(1.0) == float("inf")


def test_losses_weigh_by_seconds() -> None:
    """Rounds of a large batch take longer: what they may lose is bounded by the fast rounds around them."""
    budget = LossBudget(0.98, 1000)
    budget.add(0.0, 4.0)
    whole_s = RESERVE * 1000 * (1.0 / 0.98 - 1.0)
    assert budget.allowed_s(4.0) == pytest.approx(4.0 * whole_s / RISK_DIVISOR)
    budget.add(0.0, 1.0)
    assert budget.allowed_s(4.0) == budget.allowed_s(1.0) == pytest.approx(whole_s / RISK_DIVISOR)
    for _ in range(3000):
        budget.add(0.0, 4.0)
    assert budget.allowed_s(4.0) > 3.5 * whole_s / RISK_DIVISOR


@pytest.mark.parametrize(("guarantee", "window"), [(0.98, 0), (1.5, 1000), (0.0, 1000)])
def test_an_impossible_guarantee(guarantee: float, window: int) -> None:
    """It is refused in one line."""
    with pytest.raises(InputError, match=r"needed"):
        LossBudget(guarantee, window)


def times() -> RoundTimeModel:
    return RoundTimeModel([1, 2])


def test_the_machine_is_no_matter_of_a_setup() -> None:
    """A machine that turns slower in all changes no ratio, whichever setup is running; spikes change nothing."""
    model, rng = times(), random.Random(1)
    for now in range(600):
        setup = (0, 0) if now % 100 > 92 else (1, 1)
        slow = 1.0 if now < 200 else 3.0
        slow *= 20.0 if now % 50 < 2 else 1.0
        model.observe(setup, slow * rng.lognormvariate(0.0, 0.05), now)
        model.update()
    assert model.factors(1)[1] / model.factors(0)[0] == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("ratio", [0.85, 1.1, 1.5, 3.0])
def test_stored_ratios_that_are_wrong_are_unlearned(ratio: float) -> None:
    """A draft whose rounds take more or less than stored beside plain ones."""
    model, rng = times(), random.Random(2)
    for now in range(400):
        drafting = now % 40 >= 8
        factor = (ratio if drafting else 1.0) * rng.lognormvariate(0.0, 0.03)
        model.observe((1, 1) if drafting else (0, 0), factor, now)
        model.update()
    assert model.factors(1)[1] / model.factors(0)[0] == pytest.approx(ratio, rel=0.06)
