"""The negative control sees a difference between the arms through the outliers of a busy machine."""

import random

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import InputError
from profiles.records.evidence import Sample
from profiles.stats import median_interval
from tests.support.fakes import NGRAM
from tuner.search.control import objection
from tuner.search.pairs import Pair

LOOK_UP = Setup(draft=NGRAM, length=4)


def _run(setup: Setup, number: int, ttft_s: float) -> Sample:
    """A run of 64 tokens; every fifth prefill takes twenty times as long."""
    spike = 20.0 if random.Random(f"{setup.name} {number}").random() < 0.2 else 1.0
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=f"prompt {number}",
        ttft_s=ttft_s * spike,
        decode_s=1.0,
        output_tokens=64,
        rounds={(0, 0): 63},
        output_digest="output",
    )


@pytest.mark.parametrize(("plain_s", "is_fair"), [(0.1, True), (0.187, False), (0.05, False)])
def test_outliers_hide_no_difference(plain_s: float, is_fair: bool) -> None:
    """Half the threads in one arm, on a machine that stops a fifth of the runs."""
    pairs = [Pair(_run(PLAIN, number, plain_s), _run(LOOK_UP, number, 0.1)) for number in range(24)]
    assert (objection(LOOK_UP, pairs, batch_size=1, greedy=True) is None) == is_fair
    assert objection(LOOK_UP, pairs, batch_size=4, greedy=True) is None


def test_the_median_has_an_interval_of_order_statistics() -> None:
    """The 3rd and the 10th of twelve values, which cover 96 %."""
    interval = median_interval([*range(1, 12), 1000])
    assert (interval.low, interval.estimate, interval.high) == (3, 6.5, 10)
    with pytest.raises(InputError, match="at least 6 are needed"):
        median_interval([1.0] * 5)
