"""The race: finishers are ranked as the proof measures them, and plain against plain shows no order effect."""

import random
from dataclasses import replace

import pytest

from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.evidence import Sample
from profiles.stats import LogRatio
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts, sample
from tuner.forecast.queues import spread_over_domains
from tuner.search import proof
from tuner.search.objective import among_equals
from tuner.search.pairs import Pair, Queue, run_pairs
from tuner.search.race import race

MODEL, LOOKUP = Setup(draft=DRAFT_A, length=2), Setup(draft=NGRAM, length=4)


def test_finishers_are_ranked_by_the_ratio_of_totals() -> None:
    """2.5, 0.95 and 0.95 times as fast is 1.2 over all: slower than 1.25 everywhere, though the mean log says 1.31."""
    speedups = {"copy": 2.5, "code": 0.95, "prose": 0.95}
    load = spread_over_domains([prompt for domain in speedups for prompt in prompts(4, domain)], 12)

    def run(queue: Queue, setup: Setup) -> list[Pair]:
        speedup = {MODEL: speedups[queue[0].domain], LOOKUP: 1.25, PLAIN: 1.0}[setup]
        return [Pair(sample(), sample(setup, 1.0 / speedup))]

    result = race(
        run, [(prompt,) for prompt in load], [MODEL, LOOKUP], num_finalists=3, study_name="race", storage=None
    )
    assert result.speedups[LOOKUP] == pytest.approx(1.25)
    assert result.speedups[MODEL] == pytest.approx(3.0 / (1 / 2.5 + 2 / 0.95))
    assert among_equals(result.speedups) == LOOKUP


def test_drafts_first_then_lengths_of_the_fastest() -> None:
    """Three lengths of the model are forecast best, but the look-up is raced, wins, and then its other lengths are."""
    model = [Setup(draft=DRAFT_A, length=length) for length in (4, 3, 2)]
    lookup = [Setup(draft=NGRAM, length=length) for length in (6, 8, 4, 2)]
    order: list[Setup] = []

    def run(queue: Queue, setup: Setup) -> list[Pair]:
        order.append(setup)
        speedup = 1.0 if setup == PLAIN else 1.2 if setup.draft == DRAFT_A else 1.3 + 0.01 * setup.length
        return [Pair(sample(), sample(setup, 1.0 / speedup))]

    load = [(prompt,) for prompt in prompts(12)]
    result = race(run, load, [*model, *lookup], num_finalists=3, study_name="race", storage=None)
    assert list(dict.fromkeys(order)) == [PLAIN, model[0], lookup[0], lookup[1], lookup[2]]
    assert max(result.speedups, key=lambda setup: result.speedups[setup]) == lookup[1]


def test_a_tie_never_goes_to_a_setup_that_cannot_be_claimed() -> None:
    """1.0105 is within 1.5 % of 1.025, but under 1.015 nothing can be proven."""
    assert among_equals({MODEL: 1.025, LOOKUP: 1.0105}) == MODEL
    assert among_equals({MODEL: 1.025, LOOKUP: 1.016}) == LOOKUP
    assert among_equals({MODEL: 1.01, LOOKUP: 1.005}) == MODEL


@pytest.mark.parametrize(("behind", "share"), [(0.0, 0.5), (0.05, 0.841), (1.0, 0.95)])
def test_the_level_is_split_by_how_sure_the_race_is(behind: float, share: float) -> None:
    """The chance of the winner to be the faster, by a normal difference; half to 95 %."""
    ratios = {MODEL: LogRatio(0.2, 0.03, 11.0), LOOKUP: LogRatio(0.2 - behind, 0.04, 11.0)}
    assert proof.share_of_level(ratios, MODEL, LOOKUP) == pytest.approx(share, abs=1e-3)
    assert proof.share_of_level(ratios, MODEL, None) == 0.95


@pytest.mark.parametrize(("value", "error", "is_worth"), [(0.0, 0.03, True), (0.0, 0.01, False), (0.02, 0.0, True)])
def test_what_may_be_claimed_is_worth_proving(value: float, error: float, is_worth: bool) -> None:
    """1.015 within a standard error: a vague race decides nothing, a precise one spares the proof of 1.00."""
    assert proof.is_worth_proving(LogRatio(value, error, 11.0)) == is_worth


def test_an_equal_setup_is_seldom_pruned() -> None:
    """Of 400 races of two equal drafts on 12 prompts about 5 % prune the second: 11 % did at 0.05 after each prompt."""
    rng, load, num_pruned = random.Random(1), [(prompt,) for prompt in prompts(12)], 0
    for _ in range(400):
        num_pruned += len(
            race(
                lambda _, setup: [Pair(sample(), sample(setup, 0.8 * rng.gauss(1.0, 0.1) if setup != PLAIN else 1.0))],
                load,
                [MODEL, LOOKUP],
                num_finalists=2,
                study_name="race",
                storage=None,
            ).pruned
        )
    assert 4 <= num_pruned <= 32


class SecondIsFaster(FakeEngine):
    """The second of two setups runs a tenth faster."""

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        first, second = super().run_together(workload, prompts, setups, purpose)
        return first, replace(second, decode_s=0.9 * first.decode_s)


def test_plain_against_plain_has_no_order_effect() -> None:
    """Which of the two runs counts as the setup's is drawn, about half of the time the second."""
    pairs = [run_pairs(SecondIsFaster(), GREEDY, (prompt,), PLAIN, "race 0")[0] for prompt in prompts(60)]
    assert 15 <= sum(pair.chosen.decode_s < pair.plain.decode_s for pair in pairs) <= 45
