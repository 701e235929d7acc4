"""The selector starts at its policy, learns what rounds report, steps back to plain decoding and comes again.

Rounds come from a made-up world with chances and times of its own, so that what is right to choose is known.
"""

import inspect
import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiles.errors import InputError
from profiles.steering import Pick, Round
from profiles.terms import PLAIN, Setup
from tests.policies import CODE_DRAFT, NGRAM, choice, learning_policy, policy
from tuner import selector as module
from tuner.policy import Policy, write
from tuner.selector import PROBE_ROUNDS, PROBE_SHARE, Selector

ROOT = Path(__file__).resolve().parent.parent
NGRAM8, CODE2 = Setup(draft=NGRAM, length=8), Setup(draft=CODE_DRAFT, length=2)


@dataclass
class World:
    """Plays rounds; by draft the chances that it proposes and that a position is kept, and seconds a proposed token."""

    hit: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.5, CODE_DRAFT: 1.0})
    keep: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.8, CODE_DRAFT: 0.6})
    step_s: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.001, CODE_DRAFT: 0.003})
    slowness: float = 1.0
    noise: float = 0.03
    luck: random.Random = field(default_factory=lambda: random.Random(7))
    tokens: int = 0
    seconds: float = 0.0
    picks: list[Pick] = field(default_factory=list)

    def play(self, selector: Selector, rounds: int, **question: Any) -> list[Pick]:
        """The picks of so many rounds."""
        first = len(self.picks)
        for _ in range(rounds):
            pick = selector.choose(**question)
            proposed = accepted = 0
            draft = pick.setup.draft
            if draft is not None and self.luck.random() < self.hit[draft]:
                proposed = pick.setup.length
                while accepted < proposed and self.luck.random() < self.keep[draft]:
                    accepted += 1
            seconds = (0.01 + proposed * self.step_s.get(draft, 0.0)) * self.slowness
            seconds *= self.luck.uniform(1.0 - self.noise, 1.0 + self.noise)
            assert selector.observe(Round(pick, ((proposed, accepted),), seconds))
            self.tokens += accepted + 1
            self.seconds += seconds
            self.picks.append(pick)
        return self.picks[first:]


def share(picks: list[Pick], setup: Setup) -> float:
    return sum(pick.setup == setup for pick in picks) / len(picks)


def drafted(picks: list[Pick]) -> float:
    """Share of the rounds that drafted, probes aside."""
    return sum(pick.setup != PLAIN and not pick.probe for pick in picks) / len(picks)


def test_it_starts_at_the_policy() -> None:
    """Before any report every measured point has the policy's own choice; beyond them it is plain decoding."""
    selector = Selector(learning_policy())
    assert selector.choose().setup == NGRAM8
    assert selector.choose(domain="code").setup == CODE2
    assert selector.choose(domain="law").setup == NGRAM8
    assert selector.choose(batch_size=8).setup == PLAIN
    assert selector.choose(batch_size=2).setup == PLAIN
    far = selector.choose(batch_size=9)
    assert (far.setup, far.covered) == (PLAIN, False)
    assert not selector.choose(temperature=0.7).covered


def test_it_stays_where_the_policy_is_right() -> None:
    """In a world that is as measured, nearly all rounds run the policy's setup, and it pays."""
    world = World()
    picks = world.play(Selector(learning_policy()), 3000)
    assert share(picks, NGRAM8) > 0.95
    assert world.tokens / world.seconds > 1.2 * 100.0


def test_a_draft_that_turns_useless_is_left_and_taken_up_again() -> None:
    """When nothing is kept any more plain decoding follows within 40 rounds; when it is kept again, drafting does."""
    selector, world = Selector(learning_policy()), World()
    world.play(selector, 500)
    world.keep = {NGRAM: 0.0, CODE_DRAFT: 0.0}
    world.play(selector, 40)
    assert drafted(world.play(selector, 1000)) < 0.15
    world.keep = {NGRAM: 0.8, CODE_DRAFT: 0.6}
    world.play(selector, 1500)
    assert sum(pick.setup.draft == NGRAM and pick.setup.length >= 6 for pick in world.play(selector, 500)) > 400


def test_the_loss_against_plain_decoding_is_bounded() -> None:
    """Whatever is kept, no 1,000 rounds take more than 1/0.98 of what plain decoding takes for their tokens."""
    selector, world = Selector(learning_policy()), World()
    lost: list[float] = []
    for number in range(6000):
        world.keep = dict.fromkeys(world.keep, 0.0 if number % 700 < 350 else 0.9)
        before = world.tokens, world.seconds
        world.play(selector, 1)
        lost.append((world.seconds - before[1]) / 0.01 - (world.tokens - before[0]))
    assert max(sum(lost[first : first + 1000]) for first in range(len(lost) - 1000)) < 1000 * (1 / 0.98 - 1)


def test_another_draft_is_found() -> None:
    """A draft that was measured as the worse one and is the better one comes into use by probes."""
    selector, world = Selector(learning_policy()), World()
    world.keep = {NGRAM: 0.3, CODE_DRAFT: 0.95}
    world.play(selector, 4000)
    assert sum(pick.setup.draft == CODE_DRAFT for pick in world.play(selector, 500)) > 400


def test_the_length_follows_acceptance() -> None:
    """Where less is kept rounds get shorter, where more is kept longer."""
    lengths = []
    for keep in (0.55, 0.95):
        selector, world = Selector(learning_policy()), World()
        world.keep = {NGRAM: 0.1, CODE_DRAFT: keep}
        world.play(selector, 1500, domain="code")
        lengths.append(world.play(selector, 1, domain="code")[0].setup.length)
    assert lengths[0] <= 2 < 3 < lengths[1]


def test_rounds_that_take_longer_than_stored() -> None:
    """A draft whose rounds take three times as long is left; a machine that is slower in all changes nothing."""
    selector, world = Selector(learning_policy()), World()
    world.step_s = {NGRAM: 0.008, CODE_DRAFT: 0.02}
    world.play(selector, 300)
    assert drafted(world.play(selector, 300)) < 0.1
    selector, world = Selector(learning_policy()), World(slowness=2.0)
    world.play(selector, 300)
    assert share(world.play(selector, 1000), NGRAM8) > 0.9


def test_probes_keep_their_budget() -> None:
    """What probes lose against the setup in use stays within 0.25 % of the tokens and one burst."""
    selector, world = Selector(learning_policy()), World(noise=0.0)
    picks, lost = [], 0.0
    for _ in range(5000):
        before = world.tokens, world.seconds
        picks += world.play(selector, 1)
        if picks[-1].probe:
            lost += (world.seconds - before[1]) * 140.0 - (world.tokens - before[0])
    assert any(pick.probe for pick in picks)
    assert lost < PROBE_SHARE * world.tokens + 4.0 * PROBE_ROUNDS


def test_a_change_of_batch_changes_the_setup_at_once() -> None:
    """Batches on either side of the crossover have choices of their own: no ramp, nothing to unlearn."""
    selector, world = Selector(learning_policy()), World()
    for _ in range(20):
        assert all(pick.setup == PLAIN for pick in world.play(selector, 10, batch_size=8) if not pick.probe)
        assert all(pick.setup == NGRAM8 for pick in world.play(selector, 10) if not pick.probe)


def test_scoring_takes_the_place_of_probes() -> None:
    """Where the engine can score, plain decoding asks for a model to be scored, and believes the answer."""
    selector = Selector(learning_policy(), scores=True)
    asked = 0
    for _ in range(12000):
        pick = selector.choose(batch_size=8)
        length = pick.setup.length
        outcome = (length, length if pick.setup.draft == CODE_DRAFT else 0)
        assert selector.observe(Round(pick, (outcome,) * 8, 0.01 + 0.008 * length))
        if pick.score is not None:
            asked += 1
            assert pick.score.draft == CODE_DRAFT
            assert selector.observe(Round(pick, ((8, 8),) * 40, 0.01, scored=True))
    assert asked > 0
    assert selector.choose(batch_size=8).setup.draft == CODE_DRAFT


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
    ],
)
def test_impossible_reports_are_refused(rows: Any, seconds: Any) -> None:
    """They are counted and change nothing."""
    selector = Selector(learning_policy())
    before = selector.snapshot()
    assert not selector.observe(Round(selector.choose(), rows, seconds))
    assert selector.num_refused == 1
    after = selector.snapshot()
    assert after["places"] == before["places"]
    assert after["ledger"] == before["ledger"]


def test_a_report_of_what_was_never_picked_is_refused() -> None:
    """A setup or a measured point that the policy does not have, and a score that was not asked for."""
    selector = Selector(learning_policy())
    pick = selector.choose()
    strange = Setup(draft=replace(NGRAM, max_match=9), length=2)
    assert not selector.observe(Round(pick._replace(setup=strange), ((2, 1),), 0.01))
    assert not selector.observe(Round(pick._replace(domain="law"), ((2, 1),), 0.01))
    assert not selector.observe(Round(pick, ((2, 1),), 0.01, scored=True))
    assert selector.observe(Round(pick._replace(setup=replace(NGRAM8)), ((2, 1),), 0.01))
    assert selector.num_refused == 3


def test_what_is_not_covered_teaches_nothing() -> None:
    """Rounds beyond the measured points are heard and forgotten."""
    selector = Selector(learning_policy())
    assert selector.observe(Round(selector.choose(batch_size=64), ((0, 0),) * 64, 0.01))
    assert selector.num_rounds == 0


def test_a_policy_without_a_prior_is_applied_as_it_stands() -> None:
    """Earlier versions' policies give their choices, whatever is reported."""
    selector = Selector(policy(choice(NGRAM8)))
    for _ in range(200):
        pick = selector.choose()
        assert pick.setup == NGRAM8
        assert selector.observe(Round(pick, ((8, 0),), 1.0))


def test_a_draft_that_broke_a_limit_is_never_picked() -> None:
    """Without round times at a point the draft is no option there."""
    known = learning_policy()
    assert known.prior is not None
    prior = replace(known.prior, times=tuple(one for one in known.prior.times if one.draft != 1 or one.batch_size != 1))
    limited = replace(known, choices=(choice(NGRAM8), choice(PLAIN, batch_size=8)), prior=prior)
    world = World(keep={NGRAM: 0.1, CODE_DRAFT: 0.99})
    picks = world.play(Selector(limited), 3000)
    assert all(pick.setup.draft != CODE_DRAFT for pick in picks)


def test_the_same_reports_give_the_same_picks() -> None:
    """Also with a snapshot, through JSON, in the middle; another seed probes at other moments."""
    runs = []
    for seed in (1, 1, 2):
        selector, world = Selector(learning_policy(), seed=seed), World()
        world.play(selector, 1000)
        after = Selector(learning_policy(), seed=9)
        after.restore(json.loads(json.dumps(selector.snapshot())))
        twin = World(luck=random.Random())
        twin.luck.setstate(world.luck.getstate())
        assert world.play(selector, 500) == twin.play(after, 500)
        runs.append([(pick.setup, pick.probe) for pick in world.picks])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "snapshot version 2: this draftpick knows 1"),
        ({"policy": "00"}, "made under another policy"),
        ({"counters": [1, 2]}, "the snapshot is damaged"),
        ({"places": {}}, "the snapshot is damaged"),
        ({"ledger": {"now": 1, "total": "x", "floor": [[0, 0]]}}, "the snapshot is damaged"),
    ],
)
def test_a_snapshot_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    """It is refused in one line, and the selector goes on as it was."""
    selector = Selector(learning_policy())
    World().play(selector, 100)
    before = selector.snapshot()
    with pytest.raises(InputError, match=message):
        selector.restore({**before, **change})
    assert selector.snapshot() == before


def test_a_replaced_policy_keeps_what_was_learned() -> None:
    """Of the drafts and domains that both know; the choices are the new policy's."""
    selector, world = Selector(learning_policy()), World()
    world.keep = {NGRAM: 0.1, CODE_DRAFT: 0.1}
    world.play(selector, 600, domain="code")
    newer = learning_policy()
    newer = replace(newer, created="2026-11-22T09:30:00+00:00", choices=(newer.choices[1], newer.choices[0]))
    selector.replace(newer)
    assert selector.policy is newer
    assert drafted(world.play(selector, 200, domain="code")) < 0.2


def test_threads_share_a_selector() -> None:
    """Reports from eight threads, with the policy replaced between them, are all counted."""
    selector = Selector(learning_policy())

    def serve(seed: int) -> int:
        world = World(luck=random.Random(seed))
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
    assert module.__doc__ is not None
    found = re.search(r"Serving code:\n\n(.*?)\n\nA batch", module.__doc__, re.DOTALL)
    assert found is not None
    code = inspect.cleandoc(found[1])
    assert len(code.splitlines()) <= 15
    request = SimpleNamespace(done=False, context_length=300, domain="code")
    rounds = []

    def decode_round(request: SimpleNamespace, setup: Setup) -> tuple[int, int]:
        rounds.append(setup)
        request.done = len(rounds) == 20
        return setup.length, 0

    names = {"requests": [request], "decode_round": decode_round, "time": time}
    exec(code, names)
    assert names["selector"].num_rounds == 20  # type: ignore[attr-defined]
    assert rounds[0] == CODE2


def test_serving_code_loads_nothing_heavy() -> None:
    """In a fresh process, importing the selector loads no heavy library, and not even the records of a policy."""
    heavy = "{'torch', 'transformers', 'optuna', 'sqlalchemy', 'sklearn', 'numpy', 'scipy', 'typing', 'dataclasses'}"
    program = f"import sys, tuner.selector; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    heavy = "{'torch', 'transformers', 'optuna', 'sqlalchemy', 'sklearn', 'numpy', 'scipy', 'matplotlib', 'rich'}"
    program = f"import sys, tuner.selector, tuner.policy; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_impossible_question() -> None:
    """A value that cannot exist raises an error that names it, every time."""
    selector = Selector(learning_policy())
    for _ in range(2):
        with pytest.raises(InputError, match="batch size 0: whole numbers from 1 are allowed"):
            selector.choose(batch_size=0)


def test_policies_with_a_prior_go_through_json(tmp_path: Path) -> None:
    """What a selector starts from is written and read back as it was."""
    from tuner.policy import read

    write(tmp_path / "policy.json", learning_policy())
    again: Policy = read(tmp_path / "policy.json")
    assert again == learning_policy()
