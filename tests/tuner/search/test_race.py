"""The race: finishers are ranked as the proof measures them, and plain against plain shows no order effect."""

from dataclasses import replace

import pytest

from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.evidence import Sample
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts
from tuner.forecast.queues import spread_over_domains
from tuner.search.objective import among_equals
from tuner.search.pairs import Pair, Queue, run_pairs
from tuner.search.race import race

MODEL, LOOKUP = Setup(draft=DRAFT_A, length=2), Setup(draft=NGRAM, length=4)


def _sample(setup: Setup, prompt: Prompt, decode_s: float) -> Sample:
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=0.1,
        decode_s=decode_s,
        output_tokens=11,
        rounds={(0, 0): 10},
        output_digest="o",
    )


def test_finishers_are_ranked_by_the_ratio_of_totals() -> None:
    """2.5, 0.95 and 0.95 times as fast is 1.2 over all: slower than 1.25 everywhere, though the mean log says 1.31."""
    speedups = {"copy": 2.5, "code": 0.95, "prose": 0.95}
    load = spread_over_domains([prompt for domain in speedups for prompt in prompts(4, domain)], 12)

    def run(queue: Queue, setup: Setup) -> list[Pair]:
        speedup = {MODEL: speedups[queue[0].domain], LOOKUP: 1.25, PLAIN: 1.0}[setup]
        return [Pair(_sample(PLAIN, prompt, 1.0), _sample(setup, prompt, 1.0 / speedup)) for prompt in queue]

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
        return [Pair(_sample(PLAIN, prompt, 1.0), _sample(setup, prompt, 1.0 / speedup)) for prompt in queue]

    load = [(prompt,) for prompt in prompts(12)]
    result = race(run, load, [*model, *lookup], num_finalists=3, study_name="race", storage=None)
    assert list(dict.fromkeys(order)) == [PLAIN, model[0], lookup[0], lookup[1], lookup[2]]
    assert max(result.speedups, key=lambda setup: result.speedups[setup]) == lookup[1]


def test_a_tie_never_goes_to_a_setup_that_cannot_be_claimed() -> None:
    """1.0105 is within 1.5 % of 1.025, but under 1.015 nothing can be proven."""
    assert among_equals({MODEL: 1.025, LOOKUP: 1.0105}) == MODEL
    assert among_equals({MODEL: 1.025, LOOKUP: 1.016}) == LOOKUP
    assert among_equals({MODEL: 1.01, LOOKUP: 1.005}) == MODEL


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
