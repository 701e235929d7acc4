"""The fake engine is what the tests that use it think it is."""

import pytest

from profiles.acceptance import expected_rounds
from profiles.records.core import PLAIN, Setup
from tests.support.fakes import DRAFT_A, GREEDY, FakeEngine, prompts


def test_fake_runs_follow_the_walk_and_the_clock() -> None:
    """Plain decoding takes 5 ms per token, rounds are as walked, draft-a is faster."""
    fake, [prompt], setup = FakeEngine(), prompts(1), Setup(draft=DRAFT_A, length=4)
    trace = fake.trace_target(GREEDY, prompt)
    plain, chosen = fake.run_together(GREEDY, (prompt,), (PLAIN, setup), "proof 0")
    walked = expected_rounds.expected_rounds(trace, fake.trace_draft(GREEDY, prompt, trace, DRAFT_A, 4), 4, 64)
    assert dict(chosen.rounds) == dict(walked.rounds)
    assert plain.rounds == {(0, 0): 63}
    assert plain.decode_s / 63 == pytest.approx(0.005, rel=0.06)
    assert sum(count * (accepted + 1) for (_, accepted), count in chosen.rounds.items()) == 63
    assert 1.1 < plain.decode_s / chosen.decode_s < 3.0
