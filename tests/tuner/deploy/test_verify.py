"""An emitted command measured against plain decoding, concurrency by concurrency."""

from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Prompt, Setup
from profiles.records.errors import EngineError, InputError
from tests.profiles.engines.openai.test_engine import DRAFTED, WORKLOAD, engine_at
from tests.support.fakes import DRAFT_A, GREEDY, FakeEngine, prompts
from tuner.deploy.verify import verify

GOOD, LONG = Setup(draft=DRAFT_A, length=3), Setup(draft=DRAFT_A, length=12)


def test_a_claim_that_holds() -> None:
    """A draft that helps is proven again at every concurrency, and the records stand in order."""
    found = verify(FakeEngine(keep=0.8), GOOD, {4: GOOD, 1: GOOD}, prompts(24), GREEDY)
    assert [(one.concurrency, one.verdict) for one in found] == [(1, "confirmed"), (4, "confirmed")]
    assert all(one.measured.num_divergences == 0 for one in found)


def test_a_claim_that_does_not_hold() -> None:
    """A draft that hardly ever agrees is slower than plain decoding: the claim is refuted."""
    [found] = verify(FakeEngine(keep=0.05), LONG, {1: LONG}, prompts(24), GREEDY)
    assert found.verdict == "refuted"
    assert found.measured.speedup.high < 1.0


def test_too_few_prompts_to_prove() -> None:
    """What the proof's conditions do not allow is not shown, however fast it looked."""
    [found] = verify(FakeEngine(keep=0.8), GOOD, {1: GOOD}, prompts(4), GREEDY)
    assert found.verdict == "not shown"


def test_a_plain_claim() -> None:
    """Where the policy leaves drafting off, the emitted command may not be much slower than plain decoding."""
    [held] = verify(FakeEngine(keep=0.8), GOOD, {1: PLAIN}, prompts(24), GREEDY)
    [lost] = verify(FakeEngine(keep=0.05), LONG, {1: PLAIN}, prompts(24), GREEDY)
    assert (held.verdict, lost.verdict) == ("confirmed", "refuted")


def test_over_two_servers(tmp_path: Path) -> None:
    """A plain server and one with the emitted words are started once each, and loaded in turn at each concurrency."""
    few = tuple(Prompt(domain="a", token_ids=(1, 2, first)) for first in range(6))
    with engine_at(tmp_path, "--step-s 0.002") as engine:
        found = verify(engine, DRAFTED, {1: DRAFTED, 2: DRAFTED}, few, WORKLOAD)
        assert engine.num_starts == 2
    assert [one.concurrency for one in found] == [1, 2]
    assert all(one.measured.speedup.estimate > 1.0 and one.measured.num_divergences == 0 for one in found)


def test_what_cannot_be_verified() -> None:
    """Nothing claimed or nothing to run is refused; an engine's failure goes through."""
    engine = FakeEngine()
    for claims, count in (({}, 24), ({1: GOOD}, 1)):
        with pytest.raises(InputError, match="at least 1 and 2"):
            verify(engine, GOOD, claims, prompts(count), GREEDY)
    engine.failure = EngineError("it died")
    with pytest.raises(EngineError, match="it died"):
        verify(engine, GOOD, {1: GOOD}, prompts(24), GREEDY)
