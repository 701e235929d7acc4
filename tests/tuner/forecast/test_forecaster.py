"""Forecasts on made-up evidence: exact arithmetic on literal step times, and agreement with the fake engine's runs."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import StepShape
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET, FakeEngine, prompts
from tuner.forecast.evidence import Evidence, calibration_lengths, gather, typical_context
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import spread_over_domains

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Little noise: the arithmetic is tested here, not how few calibration runs a draft gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.fakes.NOISE", 0.002)
        yield


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return gather(FakeEngine(), GREEDY, prompts(12), LENGTHS)


def test_plain_is_one_exactly(evidence: Evidence) -> None:
    """Plain decoding's forecast speed-up is 1 with no width: both arms are the same draws."""
    forecast = Forecaster(evidence, GREEDY, TARGET.run_digest).forecast(PLAIN, evidence.prompts)
    assert (forecast.speedup.low, forecast.speedup.estimate, forecast.speedup.high) == (1.0, 1.0, 1.0)
    assert forecast.acceptance_length == 1.0


@pytest.mark.parametrize("draft", [DRAFT_A, NGRAM], ids=["model", "ngram"])
def test_forecast_agrees_with_real_runs(evidence: Evidence, draft: object) -> None:
    """On an engine whose times are sums of its steps, forecast and measured speed-up agree within 4 %."""
    engine = FakeEngine()
    forecaster = Forecaster(evidence, GREEDY, TARGET.run_digest)
    for length in LENGTHS:
        setup = Setup(draft=draft, length=length)  # type: ignore[arg-type]
        plain_s = chosen_s = 0.0
        for prompt in evidence.prompts:
            plain, chosen = engine.run_together(GREEDY, (prompt,), (PLAIN, setup), "grid")
            plain_s, chosen_s = plain_s + plain.decode_s, chosen_s + chosen.decode_s
        forecast = forecaster.forecast(setup, evidence.prompts)
        assert forecast.speedup.estimate == pytest.approx(plain_s / chosen_s, rel=0.04)
        assert forecast.speedup.low <= forecast.speedup.estimate <= forecast.speedup.high


def test_forecast_of_the_unknown_raises(evidence: Evidence) -> None:
    """A prompt or a draft without evidence is named, never guessed."""
    forecaster = Forecaster(evidence, GREEDY, TARGET.run_digest)
    without = replace(evidence, acceptances={})
    with pytest.raises(NotMeasuredError, match=DRAFT_A.name):
        Forecaster(without, GREEDY, TARGET.run_digest).forecast(Setup(draft=DRAFT_A, length=2), evidence.prompts)
    with pytest.raises(NotMeasuredError, match="width 10"):
        forecaster.forecast(Setup(draft=DRAFT_A, length=9), evidence.prompts)


def test_stopping_below_a_confidence_is_not_forecast_in_a_batch(evidence: Evidence) -> None:
    """Its rounds are not replayed there, so no figure is made up."""
    setup = Setup(draft=DRAFT_A, length=4, stop_below=0.5)
    with pytest.raises(NotMeasuredError, match="not replayed in a batch"):
        Forecaster(evidence, replace(GREEDY, batch_size=2), TARGET.run_digest).forecast(setup, evidence.prompts)


def test_calibration_lengths() -> None:
    """At most two, away from the ends where there are more."""
    assert calibration_lengths(LENGTHS) == (3, 7)
    assert calibration_lengths((1, 2)) == (1, 2)
    assert calibration_lengths((5,)) == (5,)


def test_prompts_are_taken_from_the_domains_in_turn() -> None:
    """And all of them when there are fewer than asked."""
    both = (*prompts(3, "code"), *prompts(2, "prose"))
    assert [prompt.domain for prompt in spread_over_domains(both, 4)] == ["code", "prose", "code", "prose"]
    assert len(spread_over_domains(both, 99)) == 5


def test_typical_context_is_rounded_up() -> None:
    """Halfway through a run, to a multiple of 32 tokens."""
    workload = replace(GREEDY, max_new_tokens=64, context_length=512)
    assert typical_context(workload, prompts(3)) % 32 == 0


def test_a_draft_without_calibration_is_not_free(evidence: Evidence) -> None:
    """1 ms of host time in every plain round is charged to the draft's rounds too, though it was not run."""
    plain = [(setup, run) for setup, run in evidence.calibration if setup == PLAIN]
    slower = tuple(
        (setup, replace(run, decode_s=run.decode_s + 0.001 * (run.output_tokens - 1))) for setup, run in plain
    )
    forecaster = Forecaster(replace(evidence, calibration=slower), GREEDY, TARGET.run_digest)
    without = Forecaster(replace(evidence, calibration=tuple(plain)), GREEDY, TARGET.run_digest)
    for shape in (StepShape(1), StepShape(3, 2, 2)):
        setup = Setup(draft=DRAFT_A, length=2)
        more_s = forecaster.round_s(setup, shape) - without.round_s(setup, shape)
        assert more_s == pytest.approx(0.001, rel=0.05)
