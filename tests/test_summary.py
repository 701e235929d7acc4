"""What a policy tells a selector to start from: the forecasts' figures, boiled down and joined with earlier ones."""

from dataclasses import replace

import pytest

from profiles.errors import InputError
from profiles.formulas import acceptance_length
from profiles.terms import PLAIN, Infeasible, Setup
from tests.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts
from tests.policies import learning_policy
from tuner.prior import Prior, joined
from tuner.question import MIXED
from tuner.summary import summarise
from tuner.tuning import Options, Outcome, Tuner

LENGTHS = (1, 2, 4)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """Two domains at batch 1 and 2."""
    load = (*prompts(48, "code"), *prompts(48, "prose"))
    loads = [(GREEDY, load), (replace(GREEDY, batch_size=2), load)]
    return Tuner(FakeEngine(keep=0.8), Options(lengths=LENGTHS)).tune(loads)


def test_both_halves_are_the_forecasts_own(outcome: Outcome) -> None:
    """Tokens of a mean round are the walk's at every length; a round's seconds are the forecaster's."""
    prior = outcome.prior
    assert prior is not None
    assert set(prior.drafts) == {DRAFT_A, NGRAM}
    model = prior.drafts.index(DRAFT_A)
    assert prior.lengths == LENGTHS
    assert {(one.draft, one.domain) for one in prior.kept} == {
        (number, domain) for number in (0, 1) for domain in (MIXED, "code", "prose")
    }
    anchor = outcome.anchors[0]
    assert anchor.grounds is not None
    forecaster = anchor.grounds.forecaster
    kept = next(one for one in prior.kept if (one.draft, one.domain) == (model, MIXED))
    for length, tokens in zip(LENGTHS, kept.per_round, strict=True):
        rounds = forecaster.rounds(Setup(draft=DRAFT_A, length=length), anchor.forecast_pool).rounds
        assert tokens == acceptance_length(rounds)
    plain = next(one for one in prior.times if one.draft is None and one.batch_size == 1)
    assert plain.seconds == (forecaster.round_s(PLAIN, (1, 0, 0)),)
    assert {one.batch_size for one in prior.times} == {1, 2}
    assert all(len(one.seconds) == 5 for one in prior.times if one.draft is not None)
    by_look_up = [one.catch_up_s for one in prior.times if one.draft == 1 - model]
    assert by_look_up == [0.0, 0.0]


def test_what_broke_a_limit_is_left_out(outcome: Outcome) -> None:
    """A draft of which a setup is infeasible has no round times at that batch, so no selector tries it there."""
    first = outcome.anchors[0]
    first.infeasible.append(Infeasible(setup=Setup(draft=DRAFT_A, length=4), reason="memory", detail="too much"))
    try:
        prior = summarise(outcome.anchors, LENGTHS)
    finally:
        first.infeasible.pop()
    assert prior is not None
    assert [one.batch_size for one in prior.times if one.draft == prior.drafts.index(DRAFT_A)] == [2]


def test_without_a_forecast_there_is_nothing_to_start_from() -> None:
    """An engine without drafts leaves no prior."""
    engine = FakeEngine(keep=0.8)
    engine.drafts = ()
    found = Tuner(engine, Options(lengths=LENGTHS)).tune([(GREEDY, prompts(30))])
    assert found.prior is None


def test_earlier_evidence_stands_where_the_newer_says_nothing(outcome: Outcome) -> None:
    """Drafts are renumbered; of both runs the newer counts; other lengths cannot stand beside."""
    newer = outcome.prior
    assert newer is not None
    lookup = newer.drafts.index(NGRAM)
    only_lookup = Prior(
        drafts=(NGRAM,),
        lengths=newer.lengths,
        kept=tuple(
            replace(one, draft=0, domain="law") for one in newer.kept if one.draft == lookup and one.domain == MIXED
        ),
        times=tuple(replace(one, draft=0, batch_size=64) for one in newer.times if one.draft == lookup)[:1],
    )
    both = joined(newer, only_lookup)
    assert both is not None
    assert both.drafts == newer.drafts
    assert [one.draft for one in both.kept if one.domain == "law"] == [lookup]
    assert [one.draft for one in both.times if one.batch_size == 64] == [lookup]
    assert len(both.kept) == len(newer.kept) + 1
    assert joined(newer, learning_policy().prior) == newer
    assert joined(None, newer) == newer
    assert joined(newer, None) == newer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (2, 1)}, "rising ones from 1 are needed"),
        ({"lengths": ()}, "rising ones from 1 are needed"),
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
