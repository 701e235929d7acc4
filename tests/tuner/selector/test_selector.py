"""The selector starts at its policy, learns what rounds report, steps back to plain decoding and comes again."""

from dataclasses import replace

import pytest

from profiles.engines.base import RequestInfo, RoundReport
from profiles.records.core import PLAIN, Setup
from profiles.records.evidence import RoundCount
from tests.support.policies import CODE_DRAFT, NGRAM, choice, learning_policy
from tests.support.worlds import CODE2, NGRAM8, World, drafted
from tuner.selector.selector import Selector


def test_it_starts_at_the_policy() -> None:
    """Before any report every measured point has the policy's own choice; beyond them it is plain decoding."""
    selector = Selector(learning_policy())
    assert selector.choose().setup == NGRAM8
    assert selector.choose(domain="code").setup == CODE2
    assert selector.choose(domain="legal").setup == NGRAM8
    assert selector.choose(batch_size=8).setup == PLAIN
    assert selector.choose(batch_size=2).setup == PLAIN


def test_it_stays_where_the_policy_is_right() -> None:
    """In a world that is as measured, nearly all rounds run the policy's draft at about its length, and it pays."""
    world = World()
    picks = world.play(Selector(learning_policy()), 3000)
    assert sum(pick.setup.draft == NGRAM and pick.setup.length >= 6 for pick in picks) > 0.95 * 3000
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


@pytest.mark.parametrize("trust", [0, 3, 12])
def test_the_loss_against_plain_decoding_is_bounded(trust: int) -> None:
    """Drafts turn useless whenever they were trusted for some rounds: at most 2 % of a window is lost."""
    selector, world = Selector(learning_policy(), window=1000), World()
    lost, trusted = [0.0], 0
    for _ in range(3000):
        world.keep = dict.fromkeys(world.keep, 0.0 if trusted >= trust else 0.9)
        before = world.tokens, world.seconds
        pick = world.play(selector, 1)[0]
        trusted = trusted + 1 if pick.setup.draft else 0
        lost.append(lost[-1] + (world.seconds - before[1]) / 0.01 - (world.tokens - before[0]))
    worst = max(late - early for early, late in zip(lost, lost[1000:], strict=False))
    assert worst < 1000 * (1 / 0.98 - 1)


def test_another_draft_is_found() -> None:
    """A draft that was measured as the worse one and is the better one comes into use by probes."""
    selector, world = Selector(learning_policy()), World()
    world.keep = {NGRAM: 0.3, CODE_DRAFT: 0.95}
    world.play(selector, 4000)
    assert sum(pick.setup.draft == CODE_DRAFT for pick in world.play(selector, 500)) > 400


def test_a_model_drafts_whether_its_tokens_are_used_or_not() -> None:
    """A grammar drops all that a draft model proposes: its rounds cost what drafting costs, so it is left."""
    selector, plain_s, seconds = Selector(learning_policy(), drafts=[CODE_DRAFT.name]), 0.0, 0.0
    for number in range(3000):
        decision = selector.choose(requests=[RequestInfo(number // 50, "code")])
        plain_s += 0.01
        round_s = 0.01 + 0.003 * decision.setup.length
        seconds += round_s
        assert selector.observe(RoundReport(decision, ((0, 0),), round_s))
    assert plain_s / seconds > 0.97
    assert selector.stats().gain == pytest.approx(plain_s / seconds, abs=0.01)


@pytest.mark.parametrize(("keep", "least"), [(0.1, 0.98), (0.8, 1.1)])
def test_stalls_of_three_to_five_rounds(keep: float, least: float) -> None:
    """They tell nothing of a setup, plain decoding included: a useless draft stays useless, a good one in use."""
    for every, stalled, seed in ((50, 3, 0), (50, 4, 1), (200, 5, 0)):
        selector, world = Selector(learning_policy(), seed=seed), World()
        world.hit, world.keep = {NGRAM: 1.0, CODE_DRAFT: 1.0}, {NGRAM: keep, CODE_DRAFT: keep}
        usual_s = 0.0
        for number in range(3000):
            world.slowness = 20.0 if number % every >= every - stalled else 1.0
            before_s = world.seconds
            world.play(selector, 1)
            usual_s += (world.seconds - before_s) / world.slowness
        assert world.tokens * 0.01 / usual_s > least


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
    picks = world.play(selector, 1000)
    assert sum(pick.setup.draft == NGRAM and pick.setup.length >= 6 for pick in picks) > 900


def test_a_change_of_batch_changes_the_setup_at_once() -> None:
    """Batches on either side of the crossover have choices of their own: no ramp, nothing to unlearn."""
    selector, world = Selector(learning_policy()), World()
    for _ in range(20):
        assert all(pick.setup == PLAIN for pick in world.play(selector, 10, batch_size=8) if not pick.probe)
        assert all(pick.setup.draft == NGRAM for pick in world.play(selector, 10) if not pick.probe)


def test_sampling_is_probed_too() -> None:
    """A draft that is switched off at a temperature above 0 comes back by probes."""
    stored = learning_policy()
    assert stored.prior is not None
    prior = replace(
        stored.prior,
        acceptance=tuple(replace(acceptance, temperature=0.7) for acceptance in stored.prior.acceptance),
        round_times=tuple(replace(times, temperature=0.7) for times in stored.prior.round_times),
    )
    sampled = replace(stored, choices=(choice(PLAIN, temperature=0.7),), prior=prior)
    world = World(keep={NGRAM: 0.95, CODE_DRAFT: 0.95})
    assert drafted(world.play(Selector(sampled), 3000, temperature=0.7)[-500:]) > 0.9


def test_one_stall_changes_little() -> None:
    """One probe that takes ten seconds leaves drafts possible."""
    selector, world = Selector(learning_policy()), World()
    while not world.play(selector, 1)[0].probe:
        pass
    pick = selector.choose()
    assert pick.probe
    assert selector.observe(RoundReport(pick, ((0, 0),), 10.0))
    picks = world.play(selector, 3000)
    assert sum(pick.setup.draft == NGRAM for pick in picks[-500:]) > 400


def test_catching_up_and_prefills_are_charged() -> None:
    """Seconds that a draft takes besides its rounds lower the gain, and what they exceed it by ends drafting."""
    gains = []
    for extra_s in (0.0, 0.002, 0.1):
        selector, world = Selector(learning_policy(), window=1000), World()
        for _ in range(400):
            pick = world.play(selector, 1)[0]
            if pick.setup.draft:
                report = RoundReport(pick, ((0, 0),), None, extra_s)
                assert selector.observe(report)
        gains.append(selector.stats().gain)
    assert gains[0] > gains[1] > gains[2]
    assert selector.choose().setup == PLAIN
    assert selector.stats().budget < 0.2


def test_a_request_needs_no_label() -> None:
    """Two kinds of unlabelled requests in turn: each soon runs what is best for its text."""
    selector, world = Selector(learning_policy()), World()
    num_best = 0
    for number in range(120):
        is_code = number % 2 == 1
        world.hit = {NGRAM: 0.05 if is_code else 0.5, CODE_DRAFT: 1.0}
        world.keep = {NGRAM: 0.3, CODE_DRAFT: 0.9} if is_code else {NGRAM: 0.8, CODE_DRAFT: 0.3}
        picks = world.play(selector, 30, requests=[RequestInfo(number)])
        selector.finish([number])
        if number >= 60:
            best = CODE_DRAFT if is_code else NGRAM
            num_best += sum(pick.setup.draft == best for pick in picks[10:])
    assert num_best > 0.8 * 60 * 20


def test_every_request_of_a_batch_may_have_its_own_length() -> None:
    """Requests of which more is accepted draft longer; none drafts longer than the setup."""
    stored = learning_policy()
    assert stored.prior is not None
    cheap = tuple(
        replace(row, seconds=tuple(0.01 + 0.0005 * proposed for proposed in range(len(row.seconds))))
        for row in stored.prior.round_times
        if row.batch_size == 8
    )
    prior = replace(stored.prior, round_times=tuple(row for row in cheap if row.draft is not None))
    plain = tuple(row for row in stored.prior.round_times if row.draft is None)
    prior = replace(prior, round_times=(*plain, *prior.round_times))
    rows = (choice(Setup(draft=CODE_DRAFT, length=8), batch_size=8), choice(PLAIN))
    selector = Selector(replace(stored, choices=rows, prior=prior))
    requests = [RequestInfo("a"), RequestInfo("b")]
    for _ in range(30):
        decision = selector.choose(batch_size=8, requests=requests, per_request=True)
        lengths = decision.lengths or (decision.setup.length,) * 2
        assert max(lengths) <= decision.setup.length
        outcome = [RoundCount(length, length if number == 0 else 0) for number, length in enumerate(lengths)]
        # one step late and in another order, as engines report
        assert selector.observe(RoundReport(decision, tuple(outcome[::-1]), 0.012, ids=("b", "a")))
    assert lengths[0] > lengths[1]


def test_whole_requests_may_be_reported() -> None:
    """An engine that tells a request's rounds with their seconds in all teaches what single rounds teach."""
    selector = Selector(learning_policy())
    for number in range(40):
        decision = selector.choose(requests=[RequestInfo(number)])
        rounds = [RoundCount(decision.setup.length, 0)] * 10
        assert selector.observe_many(decision, rounds, 10 * 0.01 + sum(row.proposed for row in rounds) * 0.001)
    assert selector.num_rounds == 400
    assert decision.setup == PLAIN
    assert selector.observe_many(selector.choose(), [RoundCount(0, 0)] * 3, 0.03)
    assert not selector.observe(RoundReport(decision, tuple(rounds), 0.4))
    assert selector.num_refused == 1


def test_whole_requests_of_a_batch_may_be_reported() -> None:
    """Each report names its request and counts as its share of the batch; another name, or one twice, is refused."""
    requests = [RequestInfo(name) for name in "abcdefgh"]
    selector = Selector(learning_policy())
    decision = selector.choose(requests=requests)
    for request in requests:
        assert selector.observe_many(decision, [RoundCount(0, 0)] * 16, 0.16, request=request.id)
    assert selector.num_rounds == 16
    assert not selector.observe_many(decision, [RoundCount(0, 0)], 0.01)
    assert not selector.observe_many(decision, [RoundCount(0, 0)], 0.01, request="z")
    twice = selector.choose(requests=[RequestInfo("a"), RequestInfo("a")])
    assert not selector.observe(RoundReport(twice, (RoundCount(0, 0),) * 2, 0.01))
    assert selector.num_refused == 3


def test_the_nearest_measured_point_answers() -> None:
    """Another temperature, a longer context; a larger batch than any measured is plain decoding."""
    selector = Selector(learning_policy())
    assert selector.choose(temperature=0.7).setup == NGRAM8
    assert selector.choose(context_length=100_000).setup == NGRAM8
    mixed = [RequestInfo("a", None, 300, 0.0), RequestInfo("b", "code", 9000, 1.0)]
    assert selector.choose(batch_size=1, requests=mixed).covered
    far = selector.choose(batch_size=9)
    assert (far.setup, far.covered) == (PLAIN, False)


def test_the_baseline_is_named() -> None:
    """A server without speculation is faster than k = 0 in this one: gains are told over either."""
    gains = {}
    for baseline in ("k0", "server"):
        selector, world = Selector(learning_policy(), baseline=baseline), World()  # type: ignore[arg-type]
        for _ in range(600):
            pick = selector.choose()
            seconds = 0.012 if pick.setup == PLAIN else 0.01 + 0.001 * pick.setup.length
            accepted = pick.setup.length if world.rng.random() < 0.5 else 0
            selector.observe(RoundReport(pick, ((pick.setup.length, accepted),), seconds))
        gains[baseline] = selector.stats().gain
    assert gains["k0"] > 1.05 * gains["server"]
