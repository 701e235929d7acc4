"""Why a setup was chosen: worked numbers for break-even, and the reason every other candidate lost."""

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from profiles.records import core
from profiles.records.core import Draft, Interval, Model, Setup
from profiles.records.errors import InputError
from tests.support.policies import choice
from tuner.policy.estimates import RoundSplit
from tuner.report.data import Candidate, PointFigures
from tuner.report.explain import comparison, explain, needed_acceptance, sentences


def interval(estimate: float, reach: float = 0.1) -> Interval:
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach)


# Plain decoding: one token in 5 ms.
PLAIN = Candidate(
    setup_name="plain",
    draft_name="plain",
    length=0,
    forecast_speedup=interval(1.0, 0.0),
    acceptance_length=1.0,
    round_split=RoundSplit(draft_s=0.0, verify_s=0.005, overhead_s=0.0),
    forecast_tok_per_s=interval(200.0, 5.0),
    state="baseline",
    reason="what every other setup must beat",
)
# A round of 1.5 + 5.5 + 0.5 = 7.5 ms costs 1.5 plain tokens; it yields 2.4: 1.6 times as fast.
CHOSEN = Candidate(
    setup_name="draft-a k=2",
    draft_name="draft-a",
    length=2,
    forecast_speedup=interval(1.6),
    measured_speedup=interval(1.55),
    race_speedup=1.58,
    acceptance_length=2.4,
    round_split=RoundSplit(draft_s=0.0015, verify_s=0.0055, overhead_s=0.0005),
    forecast_tok_per_s=interval(320.0, 20.0),
    state="proven",
    reason="faster than plain decoding on 24 prompts the race did not use",
)
RACED = replace(
    CHOSEN,
    setup_name="draft-b k=3",
    length=3,
    measured_speedup=None,
    race_speedup=1.3,
    forecast_speedup=interval(1.7),
    state="raced",
    reason="draft-a k=2 was taken with 1.58 in the race against 1.30",
)
FORECAST_ONLY = replace(
    RACED, setup_name="draft-c k=1", length=1, race_speedup=None, forecast_speedup=interval(1.2), state="forecast only"
)
INFEASIBLE = replace(
    FORECAST_ONLY,
    setup_name="draft-d k=1",
    forecast_speedup=interval(2.5),
    state="infeasible",
    reason="it needs 9 GiB, 8 GiB are allowed",
)


def setup_of(one: Candidate) -> Setup:
    if one.length == 0:
        return core.PLAIN
    model = Model(name=one.draft_name, dtype="float32", digest="dd" * 16, num_params=400_000)
    return Setup(draft=Draft(kind="model", model=model), length=one.length)


def facts(*candidates: Candidate, chosen: Candidate = CHOSEN) -> PointFigures:
    """An anchor with the choice, plain decoding and `candidates`."""
    own = () if chosen is PLAIN else (chosen,)
    return PointFigures(
        choice=choice(
            setup_of(chosen), domain="code", context_length=384, reason="It decodes 1.55 times as fast.", evidence=()
        ),
        stopped=None,
        noise=None,
        num_forecast_prompts=12,
        candidates=(PLAIN, *own, *candidates),
    )


def why_not(one: Candidate, chosen: Candidate = CHOSEN) -> str:
    accounts = explain(facts(one, chosen=chosen)).accounts
    return next(account.why_not for account in accounts if account.setup_name == one.setup_name)


def test_a_round_must_yield_what_it_costs() -> None:
    """7.5 ms a round at 5 ms a plain token: 1.5 tokens break even, which 1 + a + a^2 = 1.5 gives at a = 0.366."""
    found = explain(facts())
    account = found.accounts[0]
    assert account.setup_name == "draft-a k=2"
    assert account.round_s == pytest.approx(0.0075)
    assert (account.draft_s, account.verify_s, account.overhead_s) == (0.0015, 0.0055, 0.0005)
    assert account.break_even_length == pytest.approx(1.5)
    assert account.break_even_acceptance == pytest.approx((3**0.5 - 1.0) / 2.0)  # 0.366: a^2 + a - 0.5 = 0
    assert account.acceptance == pytest.approx((6.6**0.5 - 1.0) / 2.0)  # 0.785: a^2 + a - 1.4 = 0
    assert account.acceptance_length / account.break_even_length == pytest.approx(1.6)
    assert found.plain_s_per_token == 0.005
    assert account.why_not == ""


@pytest.mark.parametrize(
    ("acceptance_length", "length", "acceptance"),
    [
        (1.75, 2, 0.5),  # 1 + 0.5 + 0.25
        (1.9375, 4, 0.5),  # 1 + 0.5 + 0.25 + 0.125 + 0.0625
        (1.3, 1, 0.3),
        (1.0, 4, 0.0),
        (0.9, 4, 0.0),  # the round is cheaper than a plain token
        (5.0, 4, 1.0),
        (5.01, 4, None),
        (1.01, 0, None),
    ],
)
def test_the_acceptance_a_round_needs(acceptance_length: float, length: int, acceptance: float | None) -> None:
    """The inverse of (1 - a^(k+1)) / (1 - a), its ends included."""
    found = needed_acceptance(acceptance_length, length)
    assert found == (None if acceptance is None else pytest.approx(acceptance))


def test_plain_decoding_has_nothing_to_accept() -> None:
    """Its round is one token, which breaks even with itself."""
    account = explain(facts()).accounts[1]
    assert (account.setup_name, account.break_even_length) == ("plain", 1.0)
    assert account.acceptance is None
    assert account.break_even_acceptance is None


def test_the_runner_up_is_the_fastest_that_could_be_chosen() -> None:
    """By the proof, else the race, else the forecast; what is infeasible stands last, however good its forecast."""
    found = explain(facts(INFEASIBLE, FORECAST_ONLY, RACED))
    names = [account.setup_name for account in found.accounts]
    assert names == ["draft-a k=2", "draft-b k=3", "draft-c k=1", "plain", "draft-d k=1"]
    assert found.rival == "draft-b k=3"


def test_one_may_ask_for_another_setup() -> None:
    """It takes the runner-up's place; a setup that is none, or is the choice, is refused in one line."""
    found = explain(facts(INFEASIBLE, RACED), "draft-d k=1")
    assert found.rival == "draft-d k=1"
    assert [account.setup_name for account in found.accounts[:2]] == ["draft-a k=2", "draft-d k=1"]
    with pytest.raises(InputError) as unknown:
        explain(facts(), "draft-z k=9")
    assert str(unknown.value) == (
        "setup 'draft-z k=9' is no candidate for domain 'code'; allowed are plain, draft-a k=2"
    )
    with pytest.raises(InputError, match="setup 'draft-a k=2' is what was chosen for domain 'code'; name another one"):
        explain(facts(), "draft-a k=2")


PRUNED = replace(
    RACED, race_speedup=None, state="pruned in the race", reason="it was losing, prompt by prompt, to the best so far"
)
NOT_PROVEN = replace(
    CHOSEN, measured_speedup=interval(1.05, 0.07), state="not proven", reason="its speed-up is not clearly above 1"
)
SLOW_FORECAST = replace(FORECAST_ONLY, forecast_speedup=interval(0.9))


@pytest.mark.parametrize(
    ("candidate", "chosen", "words"),
    [
        (INFEASIBLE, CHOSEN, "infeasible: it needs 9 GiB, 8 GiB are allowed"),
        (PRUNED, CHOSEN, "pruned in the race: it was losing, prompt by prompt, to the best so far"),
        (NOT_PROVEN, PLAIN, "not proven: its speed-up is not clearly above 1"),
        (PLAIN, CHOSEN, "draft-a k=2 is measured at 1.55 [1.45, 1.65] times it"),
        (PLAIN, replace(CHOSEN, measured_speedup=None), "draft-a k=2 is forecast at 1.60 [1.50, 1.70] times it"),
    ],
)
def test_why_a_candidate_lost(candidate: Candidate, chosen: Candidate, words: str) -> None:
    """As the report says it; of plain decoding with the figure that beat it."""
    assert why_not(candidate, chosen) == words


def test_what_the_terminal_says() -> None:
    """The choice, what k = 0 costs, both rounds with their break-even, and why the runner-up lost."""
    assert sentences(explain(facts(RACED))) == [
        "code, batch 1, context 384, temperature 0: draft-a k=2, proven",
        "It decodes 1.55 times as fast.",
        "Plain decoding (k = 0) takes 5.00 ms per token.",
        "A round of draft-a k=2 takes 7.50 ms (draft 1.50, verify 5.50, overhead 0.50) and yields 2.40 tokens; it "
        "breaks even with plain decoding at 1.50 tokens, an acceptance of 0.37 of each token (it has 0.78).",
        "A round of draft-b k=3 takes 7.50 ms (draft 1.50, verify 5.50, overhead 0.50) and yields 2.40 tokens; it "
        "breaks even with plain decoding at 1.50 tokens, an acceptance of 0.34 of each token (it has 0.66).",
        "Not draft-b k=3: raced: draft-a k=2 was taken with 1.58 in the race against 1.30.",
    ]


def test_a_round_that_cannot_pay_is_said() -> None:
    """10 ms of drafting for one token cannot be won back at 5 ms a plain token."""
    dear = replace(SLOW_FORECAST, round_split=RoundSplit(draft_s=0.01, verify_s=0.005, overhead_s=-0.001))
    found = explain(facts(dear, chosen=PLAIN))
    assert found.accounts[1].break_even_acceptance is None
    assert "it breaks even with plain decoding at 2.80 tokens, which no acceptance yields." in "\n".join(
        sentences(found)
    )


def test_plain_decoding_alone_is_explained_too() -> None:
    """Without a draft there is no rival and no round to tell of."""
    found = explain(facts(chosen=PLAIN))
    assert found.rival is None
    assert len(sentences(found)) == 3


def test_the_comparison_fits_80_columns() -> None:
    """One row per candidate, the choice first, 12 at most."""
    many = [replace(FORECAST_ONLY, setup_name=f"ngram:max=4,min=2 k={k}", length=k) for k in range(1, 20)]
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(comparison(explain(facts(*many)).accounts))
    lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
    assert lines[0].strip() == "forecast of the mean round: tokens, and milliseconds"
    assert lines[1].split() == ["setup", "tokens", "needed", "draft", "verify", "overhead", "speed-up"]
    assert lines[3].split() == ["draft-a", "k=2", "2.40", "1.50", "1.50", "5.50", "0.50", "1.60"]
    assert len(lines) == 3 + 12
    assert max(map(len, lines)) <= 80


def test_the_json_form_holds_all_of_it() -> None:
    """It survives JSON as it is, one object per candidate."""
    raw = json.loads(json.dumps(asdict(explain(facts(RACED))), allow_nan=False))
    assert (raw["chosen"], raw["rival"], raw["plain_s_per_token"]) == ("draft-a k=2", "draft-b k=3", 0.005)
    assert [account["setup_name"] for account in raw["accounts"]] == ["draft-a k=2", "draft-b k=3", "plain"]
    assert raw["accounts"][1]["race_speedup"] == 1.3


def test_facts_that_do_not_fit_are_refused() -> None:
    """A choice that is no candidate."""
    elsewhere = replace(CHOSEN, setup_name="draft-z k=1", draft_name="draft-z", length=1)
    with pytest.raises(InputError, match="setup 'draft-z k=1' is no candidate for domain 'code'; allowed are plain"):
        explain(replace(facts(), choice=facts(chosen=elsewhere).choice))


def test_what_the_last_run_did_not_decide_is_refused() -> None:
    """An operating point without a forecast; a draft that failed before it had one is left out."""
    with pytest.raises(InputError, match="domain 'code': the budget ended; run again"):
        explain(replace(facts(), candidates=(), stopped="the budget ended"))
    failed = Candidate(setup_name="draft-f", draft_name="draft-f", length=1, state="infeasible", reason="it failed")
    assert explain(facts(failed)) == explain(facts())


def test_a_choice_that_was_only_run() -> None:
    """What is known of it is told, and that no more is; where plain rounds were not timed, its rate stands in."""
    found = explain(facts(RACED, chosen=replace(CHOSEN, round_split=None)))
    [said] = [one for one in sentences(found) if one.startswith("draft-a k=2 was run, not traced")]
    assert said.endswith("decodes 1.55 times as fast as plain decoding; how a round's time splits is unknown.")
    assert (found.plain_s_per_token, found.accounts[0].round_s) == (0.005, None)
    json.dumps(asdict(found), allow_nan=False)
    untimed = replace(facts(), candidates=(replace(PLAIN, round_split=None), replace(CHOSEN, round_split=None)))
    assert explain(untimed).plain_s_per_token == pytest.approx(1 / 200)
    Console(file=io.StringIO()).print(comparison(found.accounts))
