"""Odd reports, snapshots, new policies and many threads, and what importing the selector loads."""

import inspect
import json
import math
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiles.engines.base import RequestInfo, RoundReport
from profiles.records.core import PLAIN, Setup
from profiles.records.errors import InputError
from profiles.records.evidence import RoundCount
from tests.support.policies import CODE_DRAFT, NGRAM, acceptance, choice, learning_policy, policy, round_times
from tests.support.worlds import CODE2, NGRAM8, World, drafted
from tuner.policy.policy import read, write
from tuner.selector import selector as module
from tuner.selector.round_time import RoundTimeModel
from tuner.selector.selector import MAX_REQUESTS, Selector


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        (((3, 4),), 0.01),
        (((9, 0),), 0.01),
        (((-1, -1),), 0.01),
        (((3, -1),), 0.01),
        (((3, 1.5),), 0.01),
        (((True, True),), 0.01),
        (((3,),), 0.01),
        ((), 0.01),
        (None, 0.01),
        (((3, 1),), float("nan")),
        (((3, 1),), float("inf")),
        (((3, 1),), 0.0),
        (((3, 1),), -1.0),
        (((3, 1),), "soon"),
        (((3, 1),), 1e308),
        (((3, 1),) * 2, 0.01),
    ],
)
def test_impossible_reports_are_refused(rows: Any, seconds: Any) -> None:
    """They are counted and change nothing."""
    selector = Selector(learning_policy())
    decision = selector.choose()
    before = selector.snapshot()
    assert not selector.observe(RoundReport(decision, rows, seconds))
    assert selector.num_refused == 1
    before["learned"]["selector"][1] = 1
    assert selector.snapshot() == before


def test_a_report_of_what_was_never_picked_is_refused() -> None:
    """A setup or a measured point that the policy does not have."""
    selector = Selector(learning_policy())
    pick = selector.choose()
    strange = Setup(draft=replace(NGRAM, max_match=9), length=2)
    assert not selector.observe(RoundReport(pick._replace(setup=strange), ((2, 1),), 0.01))
    assert not selector.observe(RoundReport(pick._replace(domain="legal"), ((2, 1),), 0.01))
    assert selector.observe(RoundReport(pick._replace(setup=replace(NGRAM8)), ((2, 1),), 0.01))
    assert selector.num_refused == 2


def test_what_is_not_covered_teaches_nothing() -> None:
    """Rounds beyond the measured points are heard and forgotten."""
    selector = Selector(learning_policy())
    assert selector.observe(RoundReport(selector.choose(batch_size=64), ((0, 0),) * 64, 0.01))
    assert selector.num_rounds == 0


def test_a_policy_without_a_prior_is_applied_as_it_stands() -> None:
    """Earlier versions' policies give their choices, whatever is reported."""
    selector = Selector(policy(choice(NGRAM8)))
    for _ in range(200):
        pick = selector.choose()
        assert pick.setup == NGRAM8
        assert selector.observe(RoundReport(pick, ((8, 0),), 1.0))


def test_a_draft_that_broke_a_limit_is_never_picked() -> None:
    """Without round times at a point the draft is no option there."""
    stored = learning_policy()
    times = tuple(times for times in stored.prior.round_times if times.draft != 1 or times.batch_size != 1)
    prior = replace(stored.prior, round_times=times)
    limited = replace(stored, choices=(choice(NGRAM8), choice(PLAIN, batch_size=8)), prior=prior)
    world = World(keep={NGRAM: 0.1, CODE_DRAFT: 0.99})
    picks = world.play(Selector(limited), 1500)
    assert all(pick.setup.draft != CODE_DRAFT for pick in picks)


def test_only_loaded_drafts_are_used() -> None:
    """The others are no options, also where the policy chose one; `replace` and `restore` keep to it."""
    selector, world = Selector(learning_policy(), drafts=[NGRAM.name]), World(keep={NGRAM: 0.4, CODE_DRAFT: 0.99})
    assert selector.choose(domain="code").setup.draft in (None, NGRAM)
    assert selector.choose().setup == NGRAM8
    selector.restore(selector.snapshot())
    selector.replace(learning_policy())
    decisions = world.play(selector, 1500, domain="code")
    assert {decision.setup.draft for decision in decisions} <= {None, NGRAM}
    alone = Selector(policy(choice(CODE2)), drafts=[NGRAM.name])
    assert alone.choose().setup == PLAIN


def test_the_same_reports_give_the_same_picks() -> None:
    """Also with a snapshot, through JSON, in the middle; another seed probes at other moments."""
    runs = []
    for seed in (1, 1, 2):
        selector, world = Selector(learning_policy(), seed=seed), World()
        world.play(selector, 1000, domain="code")
        after = Selector(learning_policy(), seed=9)
        after.restore(json.loads(json.dumps(selector.snapshot())))
        twin = World(rng=random.Random())
        twin.rng.setstate(world.rng.getstate())
        assert world.play(selector, 500, domain="code") == twin.play(after, 500, domain="code")
        runs.append([(pick.setup, pick.probe) for pick in world.picks])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "snapshot version 1: this draftpick reads version 5"),
        ({"policy": "00"}, "made under another policy"),
        ({"learned": None}, "the snapshot is damaged"),
        ({"learned": {}}, "the snapshot is damaged"),
        ({"selector": [1, 0, 4, float("nan")]}, "the snapshot is damaged"),
        ({"selector": [1, 0, 4, 0, [0.0] * 4]}, "the snapshot is damaged"),
        ({"budget": [0.0, 0.0, 0.0, 0.0, "x"]}, "the snapshot is damaged"),
        ({"budget": [0.0, 0.0]}, "the snapshot is damaged"),
        ({"stream": [[7, 0], 4.0]}, "the snapshot is damaged: IndexError"),
    ],
)
def test_a_snapshot_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    """It is refused in one line, and the selector goes on as it was."""
    selector = Selector(learning_policy())
    World().play(selector, 100)
    before, stream = selector.snapshot(), next(iter(selector._state.streams.values()))
    learned = before["learned"] | {stream.key if key == "stream" else key: value for key, value in change.items()}
    with pytest.raises(InputError, match=message):
        selector.restore({**before, "learned": learned, **change})
    assert selector.snapshot() == before


def test_a_replaced_policy_keeps_what_was_learned() -> None:
    """Of the drafts and domains that both know; the choices are the new policy's."""
    selector, world = Selector(learning_policy()), World()
    world.keep = {NGRAM: 0.03, CODE_DRAFT: 0.03}  # at 0.1 one look-up token breaks even
    world.play(selector, 600, domain="code")
    key = selector._state.domains.drafts[0.0][0].models[1].key  # the look-up's, on code
    learned = selector.snapshot()["learned"][key]
    newer = learning_policy()
    newer = replace(newer, created="2026-11-22T09:30:00+00:00", choices=(newer.choices[1], newer.choices[0]))
    selector.replace(newer)
    assert selector.policy is newer
    assert selector.snapshot()["learned"][key] == learned != Selector(newer).snapshot()["learned"][key]
    assert drafted(world.play(selector, 200, domain="code")) < 0.2


def test_a_slow_length_is_no_slow_machine() -> None:
    """A length that was just changed to and takes three times as long moves the draft, not the machine."""
    times = RoundTimeModel([1, 8])
    rounds = [((0, 0), 1.0)] * 20 + [((1, 1), 1.0)] * 40 + [((1, 7), 3.0)] * 6
    for now, (setup, ratio) in enumerate(rounds):
        times.observe(setup, ratio, now)
        times.update()
    assert math.exp(times.machine) < 1.2
    assert sum(times.logs) > 0.5


def test_a_replaced_policy_keeps_times_and_reports_under_way() -> None:
    """Times that are stored alike go on as learned; a report of a point that went teaches nothing and is no fault."""
    selector, world = Selector(learning_policy()), World(slowness=1.5)
    world.play(selector, 300)
    decision = selector.choose(domain="code")
    newer = learning_policy()
    selector.replace(replace(newer, choices=tuple(row for row in newer.choices if row.domain != "code")))
    (point,) = (point for where, point in selector._state.points.items() if where[0] == 1)
    assert point.times.machine == pytest.approx(math.log(1.5), abs=0.1)
    assert not selector.observe(RoundReport(decision, ((0, 0),), 0.01))
    assert selector.num_refused == 0


def test_other_domains_in_a_policy_age_what_was_learned() -> None:
    """A domain's rounds are no fewer than those that its models have counted."""
    selector, world = Selector(learning_policy()), World()
    world.play(selector, 400, domain="code")
    newer = learning_policy()
    assert newer.prior is not None
    more = (*newer.prior.acceptance, acceptance(0, 0.5, domain="legal"), acceptance(1, 0.5, domain="legal"))
    selector.replace(replace(newer, prior=replace(newer.prior, acceptance=more)))
    domains = selector._state.domains
    models = [model for draft in domains.drafts[0.0] for model in draft.models]
    assert max(model.last for model in models) > 100.0
    assert all(model.last <= domains.rounds[number % len(domains.names)] for number, model in enumerate(models))


def test_a_draft_that_is_better_than_stored_is_found() -> None:
    """Whatever the size of reports, from plain decoding; probes that gain cost nothing, though the draft catches up."""
    prior = replace(
        learning_policy().prior,
        drafts=(CODE_DRAFT,),
        acceptance=(acceptance(0, 0.3), acceptance(0, 0.3, domain="code")),
        round_times=(round_times(None, 0.0), round_times(0, 0.003)),
    )
    for size in (1, 13, 26):
        selector, rng, num_drafted = Selector(replace(policy(choice(PLAIN)), prior=prior)), random.Random(1), 0
        for number in range(3000 // size):
            decision = selector.choose(requests=[RequestInfo(number)])
            length = decision.setup.length
            kept = [next((at for at in range(length) if rng.random() > 0.9), length) for _ in range(size)]
            rounds = [RoundCount(length, accepted) for accepted in kept]
            assert selector.observe_many(decision, rounds, size * (0.01 + 0.003 * length))
            selector.finish([number])
            num_drafted += size * (length > 0)
        assert num_drafted > 2000


@pytest.mark.parametrize("num_domains", [1, 60])
def test_odd_priors(num_domains: int) -> None:
    """A look-up that never matched has a value of plain decoding; sixty domains hide none; no acceptance, no choice."""
    prior = learning_policy().prior
    names = [f"domain-{number}" for number in range(num_domains)]
    rows = [acceptance(0, 0.0, propose_prob=0.0, domain=name) for name in names]
    rows += [acceptance(1, 0.9, domain=name) for name in names]
    known = replace(policy(choice(Setup(draft=CODE_DRAFT, length=4))), prior=replace(prior, acceptance=tuple(rows)))
    world = World()
    world.keep[CODE_DRAFT] = 0.9
    assert drafted(world.play(Selector(known), 300)) > 0.9
    bare = replace(known, prior=replace(prior, acceptance=()))
    assert Selector(bare).choose().setup.length == 4


def test_more_requests_than_are_remembered() -> None:
    """The oldest go, also where they are of the batch."""
    selector = Selector(learning_policy())
    for number in range(MAX_REQUESTS):
        selector.choose(requests=[RequestInfo(number)])
    decision = selector.choose(requests=[RequestInfo(0), RequestInfo("new")], per_request=True)
    assert not selector.observe(RoundReport(decision, ((0, 0), (0, 0)), 0.01, ids=()))


def test_threads_share_a_selector() -> None:
    """Reports from eight threads, with the policy replaced between them, are all counted."""
    selector = Selector(learning_policy())

    def serve(seed: int) -> int:
        world = World(rng=random.Random(seed))
        for number in range(50):
            world.play(selector, 10, domain=(None, "code")[number % 2])
            if seed == 0 and number % 10 == 0:
                selector.replace(learning_policy())
        return len(world.picks)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(serve, range(8))) == 4000
    assert selector.num_rounds + selector.num_refused == 4000
    assert selector.num_refused == 0


def test_the_loop_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The serving loop that the module shows, with a made-up engine."""
    monkeypatch.chdir(tmp_path)
    write("policy.json", learning_policy())
    assert read("policy.json") == learning_policy()
    assert module.__doc__ is not None
    match = re.search(r"Serving code:\n\n(.*?)\n\nDecisions", module.__doc__, re.DOTALL)
    code = inspect.cleandoc(match[1])
    assert len(code.splitlines()) <= 16
    request = SimpleNamespace(id="r1", done=False, context_length=300, domain="code")
    rounds = []

    def decode_round(request: SimpleNamespace, setup: Setup) -> tuple[int, int]:
        rounds.append(setup)
        request.done = len(rounds) == 20
        return setup.length, 0

    names = {"requests": [request], "decode_round": decode_round, "time": time}
    exec(code, names)
    assert names["selector"].num_rounds == 20  # type: ignore[attr-defined]
    assert rounds[0] == CODE2


def test_an_impossible_question() -> None:
    """A value that cannot exist raises an error that names it, every time."""
    selector = Selector(learning_policy())
    for _ in range(2):
        with pytest.raises(InputError, match="batch size 0: whole numbers from 1 are allowed"):
            selector.choose(batch_size=0)
