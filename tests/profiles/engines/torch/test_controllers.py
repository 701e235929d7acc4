"""The baselines of the selector's benchmark do what the methods they stand for do."""

from profiles.engines.base import RoundController, RoundReport
from profiles.records.core import PLAIN, Setup
from tests.benchmarks.controllers import Oracle, Table
from tests.support.fakes import DRAFT_A, NGRAM

FAST, SLOW = Setup(draft=NGRAM, length=4), Setup(draft=DRAFT_A, length=4)


def play(controller: RoundController, num_rounds: int, accepted: int = 0) -> list[Setup]:
    """What it picks where a round keeps `accepted` tokens, or as many as it proposes."""
    picked = []
    for _ in range(num_rounds):
        pick = controller.choose()
        picked.append(pick.setup)
        row = pick.setup.length, min(accepted, pick.setup.length)
        assert controller.observe(RoundReport(pick, (row,), 1.0))
    return picked


def test_the_oracle_goes_from_request_to_request() -> None:
    """It counts the tokens of every request; one without rounds is passed over."""
    oracle = Oracle([(FAST, 6), (PLAIN, 0), (SLOW, 2)])
    assert play(oracle, 3, accepted=2) == [FAST, FAST, SLOW]


def test_a_table_is_asked_rows_and_domain() -> None:
    """And hears nothing."""
    table = Table(lambda rows, domain: FAST if (rows, domain) == (4, "code") else PLAIN)
    assert table.choose(batch_size=4, domain="code").setup == FAST
    assert table.choose(batch_size=4).setup == PLAIN
