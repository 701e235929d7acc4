"""The decision: what is raced and proven on what, what is claimed, and what is said when nothing is proven."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from profiles.records.core import PLAIN, Draft, Interval, Prompt, Setup, Workload
from profiles.records.errors import BadNumbersError, EngineError, InputError
from profiles.records.evidence import Sample, TargetTrace
from store.evidence_store import EvidenceStore
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET_STEP_S, FakeEngine, prompts, sample
from tuner.pipeline.pipeline import Outcome, Tuner, Watch
from tuner.pipeline.points import plan_points
from tuner.pipeline.trial import Options
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.policy import Choice
from tuner.policy.query import MIXED
from tuner.run import TuningSession, tune
from tuner.search import proof
from tuner.search.limits import Limits
from tuner.search.objective import among_equals, worth_racing
from tuner.search.pairs import Pair, pair_order

TWO_DOMAINS = (*prompts(48, "code"), *prompts(48, "prose"))
BOTH = (DRAFT_A, NGRAM)
MODEL = Setup(draft=DRAFT_A, length=2)


class Altered(FakeEngine):
    """Every run is what `alter` makes of its sample, setup and purpose; by default only the model draft is there."""

    def __init__(
        self,
        alter: Callable[[Sample, Setup, str], Sample] = lambda sample, *_: sample,
        drafts: tuple[Draft, ...] = (DRAFT_A,),
        **options: Any,
    ) -> None:
        super().__init__(**{"keep": 0.9, **options})
        self.alter = alter
        self.drafts = drafts

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        samples = super().run_together(workload, prompts, setups, purpose)
        of_samples = [setup for setup in setups for _ in prompts]
        return tuple(self.alter(sample, setup, purpose) for sample, setup in zip(samples, of_samples, strict=True))


def _tune(
    engine: FakeEngine, load: tuple[Prompt, ...] = TWO_DOMAINS, watch: Watch | None = None, **options: Any
) -> Outcome:
    return Tuner(engine, Options(lengths=(1, 2, 3, 4), **options), watch).tune([(GREEDY, load)])


def _decided(outcome: Outcome) -> tuple[Choice, Measured]:
    """The choice of the first row and what it measured."""
    choice = outcome.choices[0]
    assert choice.measured is not None
    return choice, choice.measured


def _measure(setup: Setup, pairs: Sequence[Pair], **design: Any) -> Measured:
    return proof.measure(proof.Design(setup=setup, greedy=True, **design), pairs)[0]


def test_a_real_gain_is_proven() -> None:
    """A draft that is kept often wins over all domains and in each, with an interval above 1."""
    outcome = _tune(Altered())
    assert [choice.domain for choice in outcome.choices] == [MIXED, "code", "prose"]
    for choice in outcome.choices:
        assert choice.proven
        assert choice.setup.draft == DRAFT_A
        assert choice.measured.speedup.low > 1.0
        assert choice.measured.num_prompts == 24
        assert len(choice.evidence) == choice.measured.num_prompts


def test_a_useless_draft_leaves_plain_decoding() -> None:
    """Nothing is proven, the choice is plain, and the reason says what was forecast or measured."""
    outcome = _tune(Altered(keep=0.0))
    for choice in outcome.choices:
        assert choice.setup == PLAIN
        assert not choice.proven
        assert choice.reason.startswith("Plain decoding")


def test_domains_choose_differently() -> None:
    """A domain where the draft is kept is proven; one where it is not stays plain."""
    outcome = _tune(Altered(keep_by_domain={"code": 0.95, "prose": 0.0}))
    by_domain = {choice.domain: choice for choice in outcome.choices}
    assert by_domain["code"].proven
    assert not by_domain["prose"].proven


def test_a_small_domain_has_no_row_of_its_own() -> None:
    """From 24 prompts on a domain has one."""
    plans = plan_points(GREEDY, (*prompts(40, "code"), *prompts(10, "prose")))
    assert [(plan.domain, len(plan.forecast_prompts), len(plan.proof_prompts)) for plan in plans] == [
        (MIXED, 17, 33),
        ("code", 13, 27),
    ]


def test_a_domain_may_not_be_called_mixed() -> None:
    """The name stands for all domains together."""
    with pytest.raises(InputError, match="domain 'mixed'"):
        plan_points(GREEDY, prompts(30, "mixed"))


EACH_ITS_DOMAIN = tuple(prompt for number in range(12) for prompt in prompts(1, f"domain {number}"))


@pytest.mark.parametrize(
    ("load", "num_proof"),
    [
        *((prompts(count), num) for count, num in ((11, 7), (12, 8), (20, 14), (24, 17), (216, 144))),
        (EACH_ITS_DOMAIN, 8),
    ],
)
def test_the_proof_shares_no_prompt_with_the_choice(load: tuple[Prompt, ...], num_proof: int) -> None:
    """A third of the prompts for the choice, the rest for the proof, however few they are or many their domains."""
    (plan,) = plan_points(GREEDY, load)
    assert not set(plan.forecast_prompts) & set(plan.proof_prompts)
    assert (len(plan.forecast_prompts), len(plan.proof_prompts)) == (len(load) - num_proof, num_proof)


def test_few_prompts_are_proven() -> None:
    """From 12 prompts on a large gain is proven on those that had no part in the choice; with 11 nothing is."""
    for count, num_proof in ((20, 14), (12, 8)):
        (choice,) = _tune(FakeEngine(keep=0.9), prompts(count)).choices
        assert choice.proven
        assert f"on {num_proof} other prompts" in choice.reason
    choice, _ = _decided(_tune(FakeEngine(keep=0.9), prompts(11)))
    assert not choice.proven
    assert "of only 7 prompts" in choice.reason


def test_the_proof_has_the_help_of_forecasts() -> None:
    """24 of 80 prompts are timed at the first look; all are traced after the choice, for the chosen draft alone."""
    engine = FakeEngine(keep=0.9)
    seen: list[str] = []
    outcome = _tune(engine, prompts(120), watch=Watch(progress=lambda stage, *_: seen.append(stage)))
    choice, measured = _decided(outcome)
    assert (measured.num_prompts, measured.num_forecast_prompts) == (24, 80)
    assert "on 24 other prompts (with forecasts of 80)" in choice.reason
    assert engine.calls["trace_target"] == 120
    num_components = 1 + (measured.setup.draft is not None and measured.setup.draft.kind == "composite")
    assert engine.calls["trace_draft"] == 2 * 40 + num_components * 80
    stages = list(dict.fromkeys(seen))
    assert stages.index("race mixed") < stages.index(f"trace for the proof of {measured.setup.name}")
    assert stages[-1] == "proof mixed"


@pytest.mark.parametrize(("slower", "num_lengths"), [(1.0, 2), (1.2, 4)])
def test_further_lengths_are_raced_where_the_forecast_does_not_hold(slower: float, num_lengths: int) -> None:
    """Forecasts of a draft err alike, so that a race which confirms one confirms the others."""

    def alter(sample: Sample, setup: Setup, purpose: str) -> Sample:
        is_slower = purpose.startswith("race") and setup != PLAIN
        return replace(sample, decode_s=sample.decode_s * slower) if is_slower else sample

    tuner = Tuner(Altered(alter, BOTH), Options(lengths=tuple(range(1, 9))))
    race = tuner.tune([(GREEDY, prompts(36))]).points[0].race
    assert race is not None
    assert len(race.speedups) + len(race.pruned) == num_lengths


def test_drafts_that_are_only_run_are_proven_by_runs_alone() -> None:
    """Nothing can be traced for the proof."""
    engine = Altered()
    engine.capabilities = replace(engine.capabilities, traced_kinds=("ngram",))
    choice, measured = _decided(_tune(engine, prompts(120)))
    assert choice.proven
    assert measured.num_forecast_prompts is None
    assert engine.calls["trace_draft"] == 0
    assert engine.calls["trace_target"] == 40


def _short_proofs(gain: float = 1.0, keep: float = 0.9, drafts: tuple[Draft, ...] = (DRAFT_A,)) -> Altered:
    """In the proof draft-a gains `gain` and no more, with 10 % noise."""

    def alter(sample: Sample, setup: Setup, purpose: str) -> Sample:
        if not purpose.startswith("proof") or setup.draft != DRAFT_A:
            return sample
        noise = random.Random(f"{sample.prompt_digest}x").gauss(1.0, 0.1)
        return replace(sample, decode_s=63 * TARGET_STEP_S / gain * noise)

    return Altered(alter, drafts, keep=keep)


def test_the_runner_up_is_proven_when_the_winner_fails() -> None:
    """Draft-a wins the race and gains nothing in the proof; the look-up, second in the race, is proven."""
    outcome = _tune(_short_proofs(1.013, 0.95, BOTH), prompts(108))
    assert max(outcome.points[0].race.speedups.items(), key=lambda item: item[1])[0].draft == DRAFT_A
    (choice,) = outcome.choices
    assert choice.proven
    assert choice.setup.draft == NGRAM


def test_what_is_not_proven_says_what_would_have_been() -> None:
    """Estimate, interval and the gain that is shown 80 % of the time, after all prompts were timed."""
    choice, measured = _decided(_tune(_short_proofs(1.015), prompts(108)))
    assert not choice.proven
    assert measured.num_prompts == 72
    detectable = measured.detectable_speedup
    assert detectable is not None
    # (t + t') sd / sqrt(n) of a log gain with 10 % noise on 72 prompts; twice the noise of a run
    assert detectable == pytest.approx(1.0 + 2.84 * 0.1 / 72**0.5, abs=0.01)
    assert f"80% of the time this run would have shown a speed-up of {detectable:.3f}" in choice.reason


def test_looks_at_all_rows_take_turns() -> None:
    """Every row has its first look before one has its second; a row that is proven stops there."""
    stages: list[tuple[str, int]] = []
    load = (*prompts(96, "code"), *prompts(96, "prose"))
    outcome = _tune(_short_proofs(), load, Watch(progress=lambda stage, done, _: stages.append((stage, done))))
    first = [domain for domain, done in stages if domain.startswith("proof") and done == 0]
    again = [domain for domain, done in stages if domain.startswith("proof") and done == 24]
    assert first == again == ["proof mixed", "proof code", "proof prose"]
    assert stages.index((first[-1], 0)) < stages.index((again[0], 24))
    assert [point.measured.num_prompts for point in outcome.points if point.measured] == [128, 64, 64]


def test_rows_of_earlier_runs_share_the_level() -> None:
    """Beside many rows that are not rejected a proof goes on, where alone it ends at its first look."""
    alone, beside = (
        _decided(_tune(_short_proofs(1.1), prompts(150), standing_p_values=standing))[1].num_prompts
        for standing in ((), (1.0,) * 2000)
    )
    assert alone < beside


def test_a_proof_that_the_budget_ends_keeps_its_runs() -> None:
    """After 40 of 72 prompts there is an estimate of 40."""
    done: list[str] = []
    watch = Watch(progress=lambda stage, *_: done.append(stage), out_of_time=lambda: done.count("proof mixed") >= 40)
    choice, measured = _decided(_tune(_short_proofs(), prompts(108), watch))
    assert measured.num_prompts == 40
    assert choice.out_of_time
    assert "the budget ended" in choice.reason


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_budget_ends_after_the_first_unit_of_a_proof(batch_size: int) -> None:
    """One prompt, or one queue of a batch, has no interval: plain decoding, because the budget ended."""
    done: list[str] = []
    watch = Watch(progress=lambda stage, *_: done.append(stage), out_of_time=lambda: "proof mixed" in done)
    tuner = Tuner(FakeEngine(keep=0.9), Options(lengths=(1, 2, 3, 4)), watch)
    (choice,) = tuner.tune([(replace(GREEDY, batch_size=batch_size), prompts(24))]).choices
    assert choice.out_of_time
    assert choice.measured is None
    assert choice.reason.endswith("was not proven, because the budget ended before it was proven.")


def test_the_budget_ends_in_the_proof_of_the_runner_up() -> None:
    """The first draft's figures stay, and the reason names whose proof is missing."""
    done: list[str] = []
    watch = Watch(progress=lambda stage, *_: done.append(stage), out_of_time=lambda: done.count("proof mixed") >= 73)
    choice, measured = _decided(_tune(_short_proofs(1.013, 0.95, BOTH), prompts(108), watch))
    assert choice.out_of_time
    assert measured.setup.draft == DRAFT_A
    assert "; the budget ended before ngram" in choice.reason


def _slow_prefill(draft_wait_s: float) -> Altered:
    """Long prompts: plain decoding and the look-up wait 0.5 s for their first token, the draft model longer."""
    return Altered(
        lambda sample, setup, _: replace(sample, ttft_s=draft_wait_s if setup.draft == DRAFT_A else 0.5),
        BOTH,
        keep=0.95,
    )


def _fail_in_proofs(sample: Sample, setup: Setup, purpose: str) -> Sample:
    if purpose.startswith("proof") and setup.draft == DRAFT_A:
        raise EngineError("draft-a ends")
    return sample


@pytest.mark.parametrize("engine", [Altered(_fail_in_proofs, BOTH, keep=0.97), _slow_prefill(0.75)])
def test_a_draft_that_is_ruled_out_leaves_the_level_to_the_next(
    engine: Altered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up may spend what draft-a never looked at, or spent on a gain while decoding that was shown."""
    shares = []

    def measure(design: proof.Design, *args: Any, **kwargs: Any) -> Any:
        shares.append((design.setup.draft, design.share))
        return measured(design, *args, **kwargs)

    measured = proof.measure
    monkeypatch.setattr(proof, "measure", measure)
    (choice,) = _tune(engine, prompts(72)).choices
    assert choice.proven
    assert shares[-1] == (NGRAM, pytest.approx(0.95, abs=0.02))


def test_what_differs_between_domains_is_no_uncertainty() -> None:
    """Copying gains 2.5 and prose 1.1 on every prompt: their shares are fixed, so their mean is known."""
    pairs = [_queue_pair(number, (2.5 if number % 3 == 0 else 1.1) + 0.01 * (number % 2)) for number in range(30)]
    domains = {f"p{number}": "copy" if number % 3 == 0 else "prose" for number in range(30)}
    pooled, by_domain = (_measure(MODEL, pairs, domains=each) for each in (None, domains))
    assert pooled.speedup.high - pooled.speedup.low > 0.4
    assert by_domain.speedup.high - by_domain.speedup.low < 0.02
    assert by_domain.speedup.estimate == pooled.speedup.estimate


def test_a_winner_that_is_slower_end_to_end_is_ruled_out() -> None:
    """The draft model decodes fastest and loses it all in its prefill; the look-up behind it is proven instead."""
    outcome = _tune(_slow_prefill(0.75), prompts(72))
    choice, measured = _decided(outcome)
    assert choice.proven
    assert choice.setup.draft == NGRAM
    assert measured.end_to_end.estimate > 1.0
    assert {(failed.setup.draft, failed.reason) for failed in outcome.infeasible} == {(DRAFT_A, "end to end")}
    (rejected,) = outcome.points[0].rejected
    assert rejected.speedup.low > 1.0 > rejected.end_to_end.estimate


@pytest.mark.parametrize(("objective", "draft"), [("tpot", DRAFT_A), ("throughput", NGRAM)])
def test_the_objective_decides_what_is_compared(objective: Any, draft: Any) -> None:
    """With a prefill a tenth longer the draft model decodes fastest; requests are faster with the look-up."""
    outcome = _tune(_slow_prefill(0.55), prompts(72), objective=objective)
    choice, measured = _decided(outcome)
    assert choice.proven
    assert choice.setup.draft == draft
    best = outcome.points[0].forecasts[0]
    figure = measured.compared(objective)
    assert best.setup == choice.setup
    assert best.speedup.estimate == pytest.approx(figure.estimate, rel=0.1)
    assert f"{figure.estimate:.2f} [" in choice.reason


def test_a_failing_draft_is_left_out_and_the_rest_goes_on() -> None:
    """Its reason is listed; the other draft is still tried."""

    class Failing(FakeEngine):
        def trace_draft(self, workload, prompt, trace, draft, max_length):  # type: ignore[no-untyped-def]
            if draft == DRAFT_A:
                raise BadNumbersError("draft draft-a: its logits are not finite")
            return super().trace_draft(workload, prompt, trace, draft, max_length)

    outcome = _tune(Failing())
    assert [failed.reason for failed in outcome.infeasible] == ["BadNumbersError"]
    assert all(forecast.setup.draft in (None, NGRAM) for forecast in outcome.points[0].forecasts)


def test_the_budget_ends_between_units() -> None:
    """What was not proven in time is plain decoding, and the reason says so."""
    asked = iter(range(10_000))
    outcome = _tune(FakeEngine(keep=0.9), watch=Watch(out_of_time=lambda: next(asked) > 150))
    assert any("budget ended" in choice.reason for choice in outcome.choices)
    assert all(choice.proven or choice.setup == PLAIN for choice in outcome.choices)


class Timed(FakeEngine):
    """Every call takes `seconds` of `spent_s`."""

    seconds, spent_s = 0.2, 0.0

    def _asked(self, what: str) -> None:
        super()._asked(what)
        self.spent_s += self.seconds


@pytest.mark.parametrize(("budget_s", "proven"), [(60.0, True), (25.0, True), (1.0, False)])
def test_a_budget_is_shared_among_the_stages(budget_s: float, proven: bool) -> None:
    """Of 3,000 prompts a sample is traced, so that race and proof have their time; else the reason names the stage."""
    engine = Timed(keep=0.9)
    load = tuple(prompt for domain in ("code", "prose", "qa") for prompt in prompts(1000, domain))
    watch = Watch(out_of_time=lambda: engine.spent_s > budget_s, seconds_left=lambda: budget_s - engine.spent_s)
    outcome = _tune(engine, load, watch)
    assert engine.spent_s < budget_s + 1.0
    mixed = outcome.choices[0]
    assert mixed.proven == proven
    if proven:
        traced = [prompt.domain for prompt in outcome.points[0].plan.forecast_prompts]
        assert len(traced) < 0.3 * budget_s / engine.seconds
        assert {traced.count(domain) for domain in ("code", "prose", "qa")} <= {len(traced) // 3, len(traced) // 3 + 1}
    else:
        assert "before anything could be compared, after target traces within the budget (6 of 3000)" in mixed.reason


@pytest.mark.parametrize("draft", [NGRAM, DRAFT_A])
@pytest.mark.parametrize("factor", [1.87, 1.0, 0.5])
def test_arms_that_differ_in_more_than_the_draft_prove_nothing(draft: Any, factor: float) -> None:
    """A look-up leaves the prefill as it is; a draft model may make it longer, never shorter."""

    def more_threads(sample: Sample, setup: Setup, _: str) -> Sample:
        return (
            replace(sample, cores=1.0)
            if setup == PLAIN
            else replace(sample, ttft_s=sample.ttft_s / factor, cores=factor)
        )

    outcome = _tune(Altered(more_threads, (draft,)), prompts(72))
    choice, measured = _decided(outcome)
    is_fair = factor == 1.0 or (factor < 1.0 and draft == DRAFT_A)
    assert choice.proven == is_fair
    assert measured.speedup.low > 1.0
    if not is_fair:
        assert (
            "differ in more than the draft: compare their threads and settings; plain decoding used 1.0"
            in choice.reason
        )


@pytest.mark.parametrize(("share", "proven"), [(0.2, True), (1.0, False)])
def test_outputs_that_nearly_all_differ_prove_nothing(share: float, proven: bool) -> None:
    """In 16-bit types a few diverge at near-ties; a wrong mask changes all of them."""

    def diverge(sample: Sample, setup: Setup, _: str) -> Sample:
        diverges = random.Random(sample.prompt_digest).random() < share
        return replace(sample, output_digest=setup.digest) if diverges else sample

    (choice,) = _tune(Altered(diverge, BOTH), prompts(72)).choices
    assert choice.proven == proven
    assert (
        proven or "24 of 24 outputs differ from those of plain decoding, where rounding explains 47%" in choice.reason
    )


def test_a_second_run_measures_nothing(tmp_path: Path) -> None:
    """Everything is answered from the store, and the choice is the same."""
    with EvidenceStore.open(tmp_path / "evidence.db") as evidence_store:
        session = TuningSession.of(evidence_store)
        first = tune(FakeEngine(keep=0.9), [(GREEDY, TWO_DOMAINS)], session, Options(lengths=(1, 2, 3)), Watch())
        engine = FakeEngine(keep=0.9)
        second = tune(engine, [(GREEDY, TWO_DOMAINS)], session, Options(lengths=(1, 2, 3)), Watch())
    assert second.cost["measured_units"] == 0
    assert engine.calls.total() == 0
    assert second.policy.choices == first.policy.choices


def test_both_studies_are_kept_where_the_dashboard_finds_them(tmp_path: Path) -> None:
    """Forecast study and race of every operating point, with plain decoding as their first trial."""
    with EvidenceStore.open(tmp_path / "evidence.db") as evidence_store:
        session = TuningSession.of(evidence_store)
        tune(FakeEngine(keep=0.9), [(GREEDY, TWO_DOMAINS)], session, Options(lengths=(1, 2, 3)), Watch())
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    names = optuna.get_all_study_names(storage)
    assert sum("forecasts" in name for name in names) == 3
    assert sum("race" in name for name in names) >= 1
    for name in names:
        first = optuna.load_study(study_name=name, storage=storage).trials[0]
        assert "plain" in first.params.values()


def _measured(estimate: float, low: float, p_value: float, num_prompts: int = 24, num_disturbed: int = 0) -> Measured:
    others = dict.fromkeys(("end_to_end", "plain_tok_per_s", "tok_per_s"), Interval(estimate=1.2, low=1.1, high=1.3))
    return Measured(
        setup=MODEL,
        speedup=Interval(estimate=estimate, low=low, high=estimate + 0.1),
        **others,
        p_value=p_value,
        num_prompts=num_prompts,
        num_divergences=0,
        num_disturbed=num_disturbed,
    )


def test_conditions_of_a_proof() -> None:
    """Interval above 1, at least 1.5 % faster, 8 prompts; Holm looks at all operating points together."""
    assert proof.prove([_measured(1.2, 1.1, 0.001)]) == [True]
    assert proof.prove([_measured(1.2, 0.99, 0.06)]) == [False]
    assert proof.prove([_measured(1.01, 1.005, 0.001)]) == [False]
    assert proof.prove([_measured(1.2, 1.1, 0.001, num_prompts=7)]) == [False]
    assert proof.prove([_measured(1.2, 1.1, 0.001, num_disturbed=2)]) == [True]
    assert proof.prove([_measured(1.2, 1.1, 0.001, num_disturbed=3)]) == [False]
    assert proof.prove([_measured(1.2, 1.01, 0.03), _measured(1.2, 1.01, 0.04)]) == [False, False]
    assert proof.prove([_measured(1.2, 1.01, 0.02), _measured(1.2, 1.01, 0.04)]) == [True, True]


class EndsAtOnce(FakeEngine):
    """Outputs end with their first token, but for those of the prompts in `timed`."""

    timed: frozenset[str] = frozenset()

    def _trace(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        trace = super()._trace(workload, prompt)
        first = {name: getattr(trace, name)[:1] for name in ("token_ids", "target_probs", "logit_gaps")}
        return trace if prompt.digest in self.timed else replace(trace, **first, ended=True)


def test_outputs_of_one_token_prove_nothing() -> None:
    """They have no time per token: plain decoding where there are no others, and the reason says so."""
    outcome = _tune(EndsAtOnce())
    assert all(choice.setup == PLAIN for choice in outcome.choices)
    assert "first token" in outcome.choices[0].reason


def test_few_outputs_with_a_second_token() -> None:
    """A race of 12 prompts, of which one can be timed, still selects; the proof says what it lacks."""
    load, engine = prompts(90), EndsAtOnce(keep=0.9)
    engine.timed = frozenset(prompt.digest for prompt in plan_points(GREEDY, load)[0].forecast_prompts[11:])
    outcome = _tune(engine, load)
    (choice,) = outcome.choices
    assert outcome.points[0].race is not None
    assert choice.setup == PLAIN
    assert "only 0 of the 24 prompts of the proof had a second token to time: 2 are needed" in choice.reason


def test_near_equals_go_to_no_weights_then_short() -> None:
    """Within 1.5 % of the fastest: the n-gram draft first, then the shorter length."""
    longer, ngram = Setup(draft=DRAFT_A, length=3), Setup(draft=NGRAM, length=8)
    assert among_equals({MODEL: 1.49, longer: 1.50}) == MODEL
    assert among_equals({MODEL: 1.49, longer: 1.50, ngram: 1.485}) == ngram
    assert among_equals({MODEL: 1.40, longer: 1.50, ngram: 1.3}) == longer
    assert among_equals({}) is None


def test_finalists_reach_the_best_score() -> None:
    """A candidate whose interval stays under the best low end, or under 1, is not raced."""

    def forecast(length: int, low: float, estimate: float, high: float) -> Forecast:
        interval = Interval(estimate=estimate, low=low, high=high)
        return Forecast(
            setup=Setup(draft=DRAFT_A, length=length), tok_per_s=interval, speedup=interval, acceptance_length=2
        )

    chosen = worth_racing([forecast(1, 1.2, 1.3, 1.4), forecast(2, 1.1, 1.25, 1.35), forecast(3, 0.8, 0.9, 1.1)])
    assert [setup.length for setup in chosen] == [1, 2]
    assert worth_racing([forecast(1, 0.7, 0.8, 0.9)]) == ()


def test_pairs_run_in_a_drawn_order_that_repeats() -> None:
    """Plain goes first on about half of the prompts, and on the same ones again."""
    first, again = ([pair_order(GREEDY, (prompt,), MODEL)[0] == PLAIN for prompt in prompts(60)] for _ in range(2))
    assert 15 <= sum(first) <= 45
    assert first == again


def test_engine_failure_of_the_target_is_raised() -> None:
    """Without the target there is nothing to decide."""
    engine = FakeEngine()
    engine.failure = EngineError("the device is gone")
    with pytest.raises(EngineError, match="the device is gone"):
        _tune(engine)


def test_ratio_of_totals_in_a_proof() -> None:
    """Seconds per token over prompts, by hand: 3 s for 30 tokens against 2 s for 30 tokens."""
    pairs = [
        Pair(sample(PLAIN, plain_s, output_tokens=tokens), sample(MODEL, chosen_s, output_tokens=tokens))
        for plain_s, chosen_s, tokens in ((1.0, 0.6, 11), (2.0, 1.4, 21))
    ]
    measured = _measure(MODEL, pairs)
    assert measured.speedup.estimate == pytest.approx(1.5)
    assert measured.end_to_end.estimate == pytest.approx(4.0 / 3.0)
    assert measured.plain_tok_per_s.estimate == pytest.approx(10.0)
    assert measured.tok_per_s.estimate == pytest.approx(15.0)


def test_a_setup_over_the_memory_limit_is_infeasible() -> None:
    """With the figures; a draft without weights may still win."""
    needed = {DRAFT_A: 3 * 2**30, NGRAM: 2**30, None: 2**30}
    outcome = _tune(
        FakeEngine(keep=0.9),
        limits=Limits(max_memory_gib=2),
        needed_bytes=lambda setup, _: needed[setup.draft],
    )
    assert {failed.setup.draft for failed in outcome.infeasible} == {DRAFT_A}
    assert outcome.infeasible[0].detail == "it needs 3 GiB; the limit is 2 GiB"
    assert all(choice.setup.draft != DRAFT_A for choice in outcome.choices)


def test_a_slow_first_token_rules_a_draft_out() -> None:
    """The fake drafts wait 23 ms, plain decoding 20 ms: under 21.5 ms only plain decoding is feasible."""
    outcome = _tune(Altered(), limits=Limits(max_ttft_ms=21.5))
    assert {failed.reason for failed in outcome.infeasible} == {"max-ttft"}
    assert all(choice.setup == PLAIN for choice in outcome.choices)
    assert "infeasible" in outcome.choices[0].reason or "no feasible finalist" in outcome.choices[0].reason


def test_an_infeasible_leader_does_not_block_the_rest() -> None:
    """What it beat in the race is raced again without it."""

    def slow_look_up(sample: Sample, setup: Setup, _: str) -> Sample:
        return replace(sample, ttft_s=0.05, decode_s=sample.decode_s / 4) if setup.draft == NGRAM else sample

    outcome = _tune(Altered(slow_look_up, BOTH), limits=Limits(max_ttft_ms=30.0))
    assert {failed.setup.draft for failed in outcome.infeasible} == {NGRAM}
    for choice in outcome.choices:
        assert choice.proven
        assert choice.setup.draft == DRAFT_A


def test_a_choice_keeps_no_evidence_of_a_setup_that_was_ruled_out() -> None:
    """The proof of k = 4 breaks the limit and all others fail: what is left was not measured, and cites no runs."""

    def alter(sample: Sample, setup: Setup, purpose: str) -> Sample:
        if purpose.startswith(("race", "proof")) and setup.length in (1, 2, 3):
            raise EngineError("full")
        return replace(sample, ttft_s=0.05) if purpose.startswith("proof") else sample

    outcome = _tune(Altered(alter), limits=Limits(max_ttft_ms=30.0))
    assert (4, "max-ttft") in {(failed.setup.length, failed.reason) for failed in outcome.infeasible}
    for choice in outcome.choices:
        assert (choice.setup, choice.measured, choice.evidence) == (PLAIN, None, ())


def test_plain_against_plain_may_fail() -> None:
    """It only shows the noise: its failure makes nothing infeasible."""

    class NoNoise(FakeEngine):
        def run_together(self, workload, prompts, setups, purpose):  # type: ignore[no-untyped-def]
            if setups == (PLAIN, PLAIN):
                raise EngineError("full")
            return super().run_together(workload, prompts, setups, purpose)

    outcome = _tune(NoNoise(keep=0.9))
    assert outcome.infeasible == ()
    assert outcome.choices[0].proven


def test_nothing_is_feasible() -> None:
    """Where plain decoding breaks a limit too, the reason says so with its figure."""
    outcome = _tune(Altered(keep=0.0), limits=Limits(max_p95_tpot_ms=1.0))
    assert outcome.points[0].ruled_out(PLAIN) is not None
    assert outcome.choices[0].reason.startswith("Nothing is feasible: ")
    assert "of plain decoding time per token 5" in outcome.choices[0].reason


def test_only_drafting_may_be_fast_enough() -> None:
    """A limit that plain decoding breaks and a proven setup keeps is no obstacle."""
    outcome = _tune(Altered(keep=0.95), limits=Limits(max_p95_tpot_ms=4.5))
    assert outcome.choices[0].proven


@pytest.mark.parametrize("limit", ["max_memory_gib", "max_ttft_ms", "max_p95_tpot_ms"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_must_be_above_zero(limit: str, value: float) -> None:
    """Nothing and everything are no limits."""
    with pytest.raises(InputError, match="a finite number above 0"):
        Limits(**{limit: value})


def _queue_pair(number: int, plain_s: float, disturbed: bool = False) -> Pair:
    """Ten tokens of prompt `number`; the setup always takes 1 s."""
    fields = {"prompt_digest": f"p{number}", "disturbed": disturbed}
    return Pair(sample(PLAIN, plain_s, **fields), sample(MODEL, **fields))


def test_in_a_batch_the_wider_interval_counts() -> None:
    """Six queues of the same four prompts: what differs between queues shows, though prompts are alike."""
    alike = [_queue_pair(number, 1.5 + 0.01 * number) for _ in range(6) for number in range(4)]
    noisy = [_queue_pair(number, 1.5 + 0.2 * queue) for queue in range(6) for number in range(4)]
    by_prompts, by_queues = (_measure(MODEL, pairs, queue_size=4) for pairs in (alike, noisy))
    assert (by_prompts.num_prompts, by_queues.num_prompts) == (4, 4)
    assert by_queues.speedup.estimate == pytest.approx(2.0)
    assert by_queues.speedup.high - by_queues.speedup.low > 0.3
    assert by_prompts.speedup.high - by_prompts.speedup.low < 0.1


def test_disturbed_queues_are_left_out() -> None:
    """As long as four are left; else all count and the proof says how many were disturbed."""
    pairs = [_queue_pair(number, 9.0 if queue < 2 else 1.5, queue < 2) for queue in range(6) for number in range(4)]
    quiet = _measure(MODEL, pairs, queue_size=4)
    assert (quiet.speedup.estimate, quiet.num_disturbed) == (pytest.approx(1.5), 0)
    assert _measure(MODEL, pairs[:16], queue_size=4).num_disturbed == 4
