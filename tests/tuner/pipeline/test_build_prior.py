"""What a policy tells a selector to start from: the forecasts' figures, boiled down and joined with earlier ones."""

from dataclasses import replace

import pytest

from profiles.acceptance.rates import acceptance_length
from profiles.records.core import PLAIN, Draft, Setup
from profiles.records.errors import InputError
from profiles.records.evidence import Infeasible, StepShape
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts
from tests.support.policies import learning_policy
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.pipeline import Outcome, Tuner
from tuner.pipeline.trial import Options
from tuner.policy.prior import Prior, join_priors
from tuner.policy.query import MIXED, OperatingPoint

LENGTHS = (1, 2, 4)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """Two domains at batch 1 and 2."""
    load = (*prompts(48, "code"), *prompts(48, "prose"))
    loads = [(GREEDY, load), (replace(GREEDY, batch_size=2), load)]
    return Tuner(FakeEngine(keep=0.8), Options(lengths=LENGTHS)).tune(loads)


def test_both_halves_are_the_forecasts_own(outcome: Outcome) -> None:
    """Mean tokens are those of the expected rounds at every length; a round's seconds are the forecaster's."""
    prior = outcome.prior
    assert set(prior.drafts) == {DRAFT_A, NGRAM}
    model = prior.drafts.index(DRAFT_A)
    assert prior.lengths == LENGTHS
    assert {(one.draft, one.domain) for one in prior.acceptance} == {
        (number, domain) for number in (0, 1) for domain in (MIXED, "code", "prose")
    }
    point = outcome.points[0]
    forecaster = point.forecaster
    assert forecaster is not None
    kept = next(one for one in prior.acceptance if (one.draft, one.domain) == (model, MIXED))
    for length, tokens in zip(LENGTHS, kept.mean_tokens, strict=True):
        rounds = forecaster.rounds(Setup(draft=DRAFT_A, length=length), point.plan.forecast_prompts).rounds
        assert tokens == acceptance_length(rounds)
    plain = next(one for one in prior.round_times if one.draft is None and one.batch_size == 1)
    assert plain.seconds == (forecaster.round_s(PLAIN, StepShape(1)),)
    assert {one.batch_size for one in prior.round_times} == {1, 2}
    assert all(len(one.seconds) == 5 for one in prior.round_times if one.draft is not None)
    by_look_up = [one.catch_up_s for one in prior.round_times if one.draft == 1 - model]
    assert by_look_up == [0.0, 0.0]


def test_what_broke_a_limit_is_left_out(outcome: Outcome) -> None:
    """From the shortest infeasible length on, at that batch; all of the draft where it is the first."""
    assert most(outcome, 4) == {1: 2, 2: 4}
    assert most(outcome, 1) == {2: 4}


def most(outcome: Outcome, broken: int) -> dict[int, int]:
    """By batch the longest length of the draft model, when this one is infeasible at batch 1 and was not chosen."""
    infeasible = Infeasible(setup=Setup(draft=DRAFT_A, length=broken), reason="memory", detail="too much")
    points = [replace(point, candidate=None) for point in outcome.points]
    prior = build_prior([replace(points[0], infeasible=(infeasible,)), *points[1:]], LENGTHS)
    model = prior.drafts.index(DRAFT_A)
    return {one.batch_size: one.max_length for one in prior.round_times if one.draft == model}


def test_without_a_forecast_there_is_nothing_to_start_from() -> None:
    """An engine without drafts leaves no prior."""
    engine = FakeEngine(keep=0.8)
    engine.drafts = ()
    found = Tuner(engine, Options(lengths=LENGTHS)).tune([(GREEDY, prompts(30))])
    assert found.prior is None


def test_earlier_evidence_stands_under_choices_that_stand(outcome: Outcome) -> None:
    """Drafts are renumbered; where the newer run decided nothing of the earlier is left; other lengths never stand."""
    newer = outcome.prior
    lookup = newer.drafts.index(NGRAM)
    gone = Draft(kind="early_exit", num_layers=3)
    earlier = Prior(
        drafts=(gone, NGRAM),
        lengths=newer.lengths,
        acceptance=tuple(
            replace(one, draft=number, domain=domain)
            for one in newer.acceptance
            if (one.draft, one.domain) == (lookup, MIXED)
            for number in (0, 1)
            for domain in ("legal", MIXED)
        ),
        round_times=tuple(
            replace(one, draft=number, batch_size=batch)
            for one in newer.round_times
            if (one.draft, one.batch_size) == (lookup, 1)
            for number in (0, 1)
            for batch in (1, 64)
        ),
    )
    both = join_priors(newer, earlier, [OperatingPoint(64, GREEDY.context_length, "legal", 0.0)])
    assert both.drafts == (*newer.drafts, gone)
    assert [one.draft for one in both.acceptance if one.domain == "legal"] == [2, lookup]
    assert [one.draft for one in both.round_times if one.batch_size == 64] == [2, lookup]
    assert len(both.acceptance) == len(newer.acceptance) + 2
    assert len(both.round_times) == len(newer.round_times) + 2
    assert join_priors(newer, earlier, []) == newer
    assert join_priors(newer, learning_policy().prior, [OperatingPoint(1, 512, MIXED, 0.0)]) == newer
    assert join_priors(newer, None, []) == newer
    alone = join_priors(None, earlier, [OperatingPoint(64, GREEDY.context_length, "legal", 0.0)])
    assert {one.domain for one in alone.acceptance} == {"legal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (2, 1)}, "increasing ones from 1 are needed"),
        ({"lengths": ()}, "increasing ones from 1 are needed"),
        ({"drafts": (NGRAM,)}, "draft number 1: there are 1"),
        ({"lengths": (1, 2)}, "figures for other lengths"),
    ],
)
def test_halves_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    """In one line that names the value."""
    prior = learning_policy().prior
    assert prior is not None
    with pytest.raises(InputError, match=message):
        replace(prior, **change)
