"""The baselines of the selector's benchmark do what the methods they stand for do."""

from profiles.engines.base import RoundController, RoundReport
from profiles.records.core import PLAIN, Setup
from tests.benchmarks.controllers import Ema, Oracle, Table
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


def test_the_average_moves_the_step_count() -> None:
    """All kept: up to the most steps; nothing kept: down to the fewest; in between it rests one above the average."""
    ema = Ema(DRAFT_A, 3)
    assert play(ema, 11)[-1].length == 3
    assert play(ema, 60, accepted=7)[-1].length == 7
    assert play(ema, 60, accepted=0)[-1].length == 1
    assert play(ema, 60, accepted=2)[-1].length == 3


def test_zero_steps_are_tried_again() -> None:
    """In a batch it stops drafting when little is kept, and tries the smallest count every few rounds."""
    ema = Ema(DRAFT_A, 1, {1: (0, 1, 3)})
    picked = play(ema, 80)
    assert {setup.length for setup in picked[20:]} == {0, 1}


def test_the_oracle_goes_from_request_to_request() -> None:
    """It counts the tokens of every request; one without rounds is passed over."""
    oracle = Oracle([(FAST, 6), (PLAIN, 0), (SLOW, 2)])
    assert play(oracle, 3, accepted=2) == [FAST, FAST, SLOW]


def test_a_table_is_asked_rows_and_domain() -> None:
    """And hears nothing."""
    table = Table(lambda rows, domain: FAST if (rows, domain) == (4, "code") else PLAIN)
    assert table.choose(batch_size=4, domain="code").setup == FAST
    assert table.choose(batch_size=4).setup == PLAIN
