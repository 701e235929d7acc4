"""Engines that time whole rounds, run past the end and have drafts that are only run: from evidence to a choice."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.acceptance.batch_replay import replay
from profiles.acceptance.expected_rounds import RoundOutcome, expected_rounds
from profiles.engines.base import TORCH
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, NotMeasuredError
from profiles.records.evidence import AcceptanceTrace, Sample, StepShape, StepTimes, TargetTrace, covers
from profiles.stats import median
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore
from store.location import store_location
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET, FakeEngine, prompts
from tests.support.serving import NATIVE, SERVING, FakeServer
from tuner import dry_run
from tuner.deploy.stored_policies import find_policy, find_report_data
from tuner.forecast.cost_model import RoundCostModel
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.pipeline import Outcome, Tuner, Watch
from tuner.pipeline.trial import Options
from tuner.report import page
from tuner.run import TuningSession, tune

LENGTHS = (1, 2, 3, 4, 5, 6)
MODEL = RoundCostModel(TARGET.run_digest)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.fakes.NOISE", 0.002)
        yield


@pytest.fixture(scope="module", params=[1, 4], ids=["alone", "batch"])
def load(request: pytest.FixtureRequest) -> Workload:
    return replace(GREEDY, batch_size=request.param)


@pytest.fixture(scope="module")
def evidence(load: Workload) -> Evidence:
    return gather(FakeServer(), load, prompts(12), LENGTHS)


def _trace(size: int) -> TargetTrace:
    ones = (1.0,) * size
    return TargetTrace(prompt_digest="p", token_ids=tuple(range(size)), target_probs=ones, logit_gaps=ones, ended=False)


def _kept(*keep: int) -> AcceptanceTrace:
    return AcceptanceTrace(
        prompt_digest="p", draft_digest="d", accept_probs=tuple(map(float, keep)), confidences=(1.0,) * len(keep)
    )


def test_a_composite_s_round_is_its_model_s_and_wider() -> None:
    """The model drafts in every round; what it verifies beyond that costs what the look-up's rounds say."""
    mixed = Draft(kind="composite", model=DRAFT_A.model, max_match=NGRAM.max_match, min_match=NGRAM.min_match)
    usage = MODEL.usage(Setup(draft=mixed, length=3), {StepShape(4): 5.0, StepShape(9): 2.0}, 0.0)
    assert usage.steps == {(DRAFT_A.digest, 4): 7.0, (NGRAM.digest, 9): 2.0, (NGRAM.digest, 4): -2.0}
    assert (usage.num_idle, usage.num_proposing) == (0, 7.0)
    widths = {TARGET.run_digest: (1,), DRAFT_A.digest: range(2, 5), NGRAM.digest: range(1, 5)}
    times = {
        part: StepTimes(component_digest=part, batch_size=1, context_length=9, samples_s=dict.fromkeys(of, (0.1,)))
        for part, of in widths.items()
    }
    assert covers(times, TARGET, (DRAFT_A, NGRAM), 3)
    assert not covers(times, TARGET, (mixed,), 3)  # its look-up has a length of its own


def test_rounds_that_run_past_the_end() -> None:
    """5 new tokens, k = 3: the round from token 3 drafts 3 although 1 is wanted, and counts what is kept beyond."""
    keep = _kept(0, 1, 0, 1, 1, 1, 1, 0)
    assert expected_rounds(
        _trace(5), replace(keep, accept_probs=keep.accept_probs[:5], confidences=(1.0,) * 5), 3, 5
    ).rounds == {
        (3, 1): 1.0,
        (1, 1): 1.0,
    }
    assert expected_rounds(_trace(8), keep, 3, 5, past_end=True).rounds == {(3, 1): 1.0, (3, 3): 1.0}
    assert expected_rounds(_trace(8), None, 0, 5, past_end=True).rounds == {(0, 0): 4.0}


def test_a_round_is_one_step() -> None:
    """Of plain decoding or of the draft, by the tokens verified; what the model's steps were does not matter."""
    usage = MODEL.usage(Setup(draft=DRAFT_A, length=3), {StepShape(4, 3, 2): 5.0, StepShape(1): 1.0}, 2.0)
    assert usage.steps == {(DRAFT_A.digest, 4): 5.0, (DRAFT_A.digest, 1): 1.0}
    assert (usage.num_idle, usage.num_proposing, usage.num_draft_steps, usage.num_refills) == (1.0, 5.0, 0.0, 2.0)
    assert MODEL.usage(PLAIN, {StepShape(1): 7.0}, 0.0).steps == {(TARGET.run_digest, 1): 7.0}


def test_what_a_sweep_of_rounds_needs() -> None:
    """Plain rounds, and every length of every draft that is timed; a native draft is not."""
    times = FakeServer().time_steps(GREEDY, 96, 4)
    assert covers(times, TARGET, SERVING.timed((DRAFT_A, NGRAM, NATIVE)), 4)
    assert not covers(times, TARGET, (DRAFT_A, NGRAM), 5)
    assert not covers({TARGET.run_digest: times[TARGET.run_digest]}, TARGET, (DRAFT_A,), 4)


def test_widths_between_timed_ones_lie_on_a_line() -> None:
    """Quantile by quantile; a plain round stands for one without a proposal, and nothing is invented beyond."""
    timed = {TARGET.run_digest: {1: (1.0, 3.0)}, DRAFT_A.digest: {2: (3.0, 5.0, 4.0), 5: (6.0, 11.0, 8.5)}}
    steps = {
        part: StepTimes(component_digest=part, batch_size=1, context_length=9, samples_s=by_width)
        for part, by_width in timed.items()
    }
    completed = MODEL.complete(steps)[DRAFT_A.digest].samples_s
    assert completed == {1: (1.0, 3.0), 2: (3.0, 5.0, 4.0), 3: (4.75, 6.25), 4: (6.0, 8.0), 5: (6.0, 11.0, 8.5)}
    assert covers(steps, TARGET, (DRAFT_A,), 1)
    assert not covers(steps, TARGET, (DRAFT_A,), 4)  # from 2 tokens to 4 is no more than double
    steps[DRAFT_A.digest] = replace(steps[DRAFT_A.digest], samples_s=dict.fromkeys((2, 3, 5, 9), (1.0,)))
    assert all(covers(steps, TARGET, (DRAFT_A,), length) for length in range(1, 9))


def test_a_continuous_batch_is_kept_full() -> None:
    """Two rows, prompts of 2, 4 and 4 rounds that draft 4, 0 and 2: the last one ends beside the first one's repeat.

    Rows that come in together do not wait for each other; a round counts as wide as its mean row.
    """

    def rounds(count: int, proposed: int) -> list[RoundOutcome]:
        return [RoundOutcome(proposed=proposed, accepted=0, prob=1.0, by_model=False)] * count

    queue = [rounds(2, 4), rounds(4, 0), rounds(4, 2)]
    first, second, third = replay(queue, 2, SERVING)
    assert (first.refills, second.refills, third.refills) == (0, 1, 1)
    assert first.shapes == {StepShape(3): 2}
    assert second.shapes == {StepShape(3): 2, StepShape(2): 2}
    assert third.shapes == {StepShape(2): 2, StepShape(4): 2}
    padded = replay(queue, 2, TORCH)
    assert [run.refills for run in padded] == [1, 1, 0]
    assert padded[2].shapes == {StepShape(3): 4}


def test_what_a_prefill_takes() -> None:
    """Of runs with equal rounds, one refill each 50 ms: the slope, whatever the time to the first token was."""
    steps = FakeServer().time_steps(GREEDY, 96, 4)
    setup, round_s = Setup(draft=DRAFT_A, length=2), median(steps[DRAFT_A.digest].samples_s[3])

    def run(refills: int) -> Sample:
        return Sample(
            setup_digest=setup.digest,
            prompt_digest="p",
            ttft_s=0.4,
            decode_s=40 * round_s + 0.05 * refills,
            output_tokens=64,
            rounds={(2, 1): 40},
            shapes={StepShape(3): 40},
            refills=refills,
            output_digest="o",
        )

    rates = MODEL.calibrate(steps, [(setup, run(refills)) for refills in (0, 2, 5, 9)])
    assert rates[DRAFT_A].refill_s == pytest.approx(0.05)
    assert rates[DRAFT_A].factor == pytest.approx(1.0)
    alike = MODEL.calibrate(steps, [(setup, run(0)), (setup, run(1))])
    assert alike[DRAFT_A].refill_s == 0.4


def test_real_rounds_are_a_multiple_of_timed_ones() -> None:
    """Rounds of longer texts on a slower machine: each as much longer as the calibrated ones, none a constant more."""
    steps = FakeServer().time_steps(GREEDY, 96, 4)
    short_s, long_s = (median(steps[DRAFT_A.digest].samples_s[width]) for width in (2, 5))

    def run(length: int, factor: float) -> tuple[Setup, Sample]:
        setup = Setup(draft=DRAFT_A, length=length)
        found = Sample(
            setup_digest=setup.digest,
            prompt_digest="p",
            ttft_s=0.1,
            decode_s=factor * 40 * (short_s if length == 1 else long_s),
            output_tokens=64,
            rounds={(length, 1): 40},
            shapes={(length + 1, 0, 0): 40},
            output_digest="o",
        )
        return setup, found

    rates = MODEL.calibrate(steps, [run(1, 1.25), run(4, 1.25), run(4, 9.0)])[DRAFT_A]
    assert (rates.factor, rates.proposing_s, rates.idle_s) == (pytest.approx(1.25), 0.0, 0.0)


@pytest.mark.parametrize("draft", [DRAFT_A, NGRAM, NATIVE], ids=["model", "ngram", "native"])
def test_forecast_agrees_with_real_runs(load: Workload, evidence: Evidence, draft: object) -> None:
    """Whole rounds forecast real runs within 5 %; a draft that is only run is forecast by its runs."""
    engine, forecaster = FakeServer(), Forecaster(evidence, load, TARGET.run_digest)
    for length in LENGTHS:
        setup = Setup(draft=draft, length=length)  # type: ignore[arg-type]
        queue = evidence.prompts * (1 if load.batch_size == 1 else 4)
        samples = engine.run_together(load, queue, (PLAIN, setup), "grid")
        plain, chosen = samples[: len(queue)], samples[len(queue) :]
        measured = sum(run.decode_s for run in plain) / sum(run.decode_s for run in chosen)
        forecast = forecaster.forecast(setup, evidence.prompts)
        assert forecast.speedup.estimate == pytest.approx(measured, rel=0.05 if draft != NATIVE else 0.15)
        assert forecast.acceptance_length is not None
        assert forecast.acceptance_length > 1.0


def test_what_was_only_run_has_no_walk(load: Workload, evidence: Evidence) -> None:
    """Its rounds cannot be replayed, and a round of the others is not told apart into draft and check."""
    forecaster = Forecaster(evidence, load, TARGET.run_digest)
    with pytest.raises(NotMeasuredError, match="it was only run"):
        forecaster.rounds(Setup(draft=NATIVE, length=2), evidence.prompts)
    assert forecaster.split(Setup(draft=DRAFT_A, length=2), evidence.prompts).draft_s is None
    assert not evidence.can_forecast(Setup(draft=NATIVE, length=9))


class LongNativeFails(FakeServer):
    """Cannot run its native draft at more than three tokens."""

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        if any(setup.draft == NATIVE and setup.length > 3 for setup in setups):
            raise EngineError("the pool is too small")
        return super().run_together(workload, prompts, setups, purpose)


def _tuned(engine: FakeEngine) -> Outcome:
    return Tuner(engine, Options(lengths=LENGTHS), Watch()).tune([(GREEDY, prompts(48))])


def test_a_length_that_fails_is_infeasible_alone() -> None:
    """The other lengths of a native draft go on as candidates; the failed ones are rows with the engine's words."""
    outcome = _tuned(LongNativeFails(keep=0.9))
    tried = {one.setup for one in outcome.points[0].forecasts}
    assert {setup.length for setup in tried if setup.draft == NATIVE} == {1, 2, 3}
    assert {one.setup.length for one in outcome.infeasible} == {4, 5, 6}
    assert {one.detail for one in outcome.infeasible} == {"the pool is too small"}
    assert outcome.choices[0].proven


def test_a_run_is_kept_and_repeated(tmp_path: Path) -> None:
    """A whole run over a store; the second measures nothing, and a dry run knows that."""
    with EvidenceStore.open(store_location(str(tmp_path))) as evidence_store:
        session, loads = TuningSession.of(evidence_store), [(GREEDY, prompts(48))]
        first = tune(FakeServer(keep=0.9), loads, session, Options(lengths=LENGTHS), Watch())
        again = tune(FakeServer(keep=0.9), loads, session, Options(lengths=LENGTHS), Watch())
        page.write(find_report_data(evidence_store, find_policy(evidence_store, None)), tmp_path / "report.html")
    assert first.policy.headline.proven
    assert again.cost["measured_units"] == 0
    assert again.policy.choices == first.policy.choices
    found = dry_run.dry_run(FakeServer(keep=0.9), loads, store_location(str(tmp_path)), Options(lengths=LENGTHS))
    assert sum(found.new_units.values()) == 0


class OnlyRuns(FakeServer):
    """As a bare server: no draft is traced or timed."""

    def __init__(self) -> None:
        super().__init__(keep=0.9)
        self.capabilities = replace(SERVING, traced_kinds=())

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        whole = super().time_steps(workload, context_length, max_length)
        return {TARGET.run_digest: whole[TARGET.run_digest]}


def test_a_run_of_a_server_that_traces_nothing(tmp_path: Path) -> None:
    """It ends in a policy; dry run, report and look-up answer; the second run measures nothing."""
    with EvidenceStore.open(store_location(str(tmp_path))) as evidence_store:
        session, loads = TuningSession.of(evidence_store), [(GREEDY, prompts(48))]
        done = tune(OnlyRuns(), loads, session, Options(lengths=LENGTHS), Watch())
        again = tune(OnlyRuns(), loads, session, Options(lengths=LENGTHS), Watch())
        page.write(find_report_data(evidence_store, find_policy(evidence_store, None)), tmp_path / "report.html")
    assert done.policy.headline.proven
    assert again.cost["measured_units"] == 0
    dry_run.dry_run(OnlyRuns(), loads, store_location(str(tmp_path / "other")), Options(lengths=(1, 2)))


class Counting(FakeServer):
    """Another serving engine over the same models, whose outputs differ from ours where `differs` says so."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self._differs = differs

    def _trace(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        trace = super()._trace(workload, prompt)
        other = (*trace.token_ids[:-1], 4)
        return replace(trace, token_ids=other) if self._differs and prompt == prompts(12)[2] else trace


@pytest.mark.parametrize("differs", [False, True], ids=["equal", "one token differs"])
def test_traces_are_lent_where_they_agreed(tmp_path: Path, differs: bool) -> None:
    """After six prompts with equal tokens ours are taken for the rest; one token that differs keeps them apart."""
    with EvidenceStore.open(store_location(str(tmp_path))) as evidence_store:
        gather(CachedEngine(FakeEngine(), evidence_store), GREEDY, prompts(12), LENGTHS)
        engine = Counting(differs)
        gather(CachedEngine(engine, evidence_store), GREEDY, prompts(12), LENGTHS)
        assert engine.calls["trace_target"] == (12 if differs else 6)
        assert engine.calls["trace_draft"] == (24 if differs else 12)
        sampled = replace(GREEDY, temperature=0.8)
        gather(CachedEngine(engine, evidence_store), sampled, prompts(12), LENGTHS)
        assert engine.calls["trace_target"] == (12 if differs else 6) + 12


def test_drafts_run_on_too_few_prompts_are_no_candidates(tmp_path: Path) -> None:
    """With one prompt nothing can be said of a draft that is only run: the others go on."""
    with EvidenceStore.open(store_location(str(tmp_path))) as evidence_store:
        done = tune(
            OnlyRuns(), [(GREEDY, prompts(1))], TuningSession.of(evidence_store), Options(lengths=(1, 2)), Watch()
        )
    assert [one.setup for one in done.outcome.points[0].forecasts] == [PLAIN]


def test_a_look_up_that_drops_short_drafts_is_run_where_it_drafts() -> None:
    """At lengths from its match on, and at none below."""
    engine = OnlyRuns()
    engine.capabilities = replace(engine.capabilities, drops_short=True)
    found = gather(engine, GREEDY, prompts(6), (1, 2, 3))
    assert NGRAM.min_match == 2
    assert {setup.length for setup, _ in found.calibration if setup.draft == NGRAM} == {2, 3}
