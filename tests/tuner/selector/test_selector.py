"""The selector starts at its policy, learns what rounds report, steps back to plain decoding and comes again."""

from dataclasses import replace

from profiles.engines.base import RoundReport
from profiles.records.core import PLAIN
from tests.support.policies import CODE_DRAFT, NGRAM, choice, learning_policy
from tests.support.worlds import CODE2, NGRAM8, World, drafted, share
from tuner.selector.selector import PROBE_ROUNDS, PROBE_TOKEN_SHARE, Selector


def test_it_starts_at_the_policy() -> None:
    """Before any report every measured point has the policy's own choice; beyond them it is plain decoding."""
    selector = Selector(learning_policy())
    assert selector.choose().setup == NGRAM8
    assert selector.choose(domain="code").setup == CODE2
    assert selector.choose(domain="legal").setup == NGRAM8
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
    picks = world.play(selector, 1000)
    assert sum(pick.setup.draft == NGRAM and pick.setup.length >= 6 for pick in picks) > 900


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
    assert lost < PROBE_TOKEN_SHARE * world.tokens + 4.0 * PROBE_ROUNDS


def test_a_change_of_batch_changes_the_setup_at_once() -> None:
    """Batches on either side of the crossover have choices of their own: no ramp, nothing to unlearn."""
    selector, world = Selector(learning_policy()), World()
    for _ in range(20):
        assert all(pick.setup == PLAIN for pick in world.play(selector, 10, batch_size=8) if not pick.probe)
        assert all(pick.setup == NGRAM8 for pick in world.play(selector, 10) if not pick.probe)


def test_sampling_is_probed_too() -> None:
    """A draft that is switched off at a temperature above 0 comes back by probes."""
    known = learning_policy()
    assert known.prior is not None
    prior = replace(
        known.prior,
        acceptance=tuple(replace(acceptance, temperature=0.7) for acceptance in known.prior.acceptance),
        round_times=tuple(replace(times, temperature=0.7) for times in known.prior.round_times),
    )
    sampled = replace(known, choices=(choice(PLAIN, temperature=0.7),), prior=prior)
    world = World(keep={NGRAM: 0.95, CODE_DRAFT: 0.95})
    assert drafted(world.play(Selector(sampled), 3000, temperature=0.7)[-500:]) > 0.9


def test_what_was_only_forecast_is_probed_first() -> None:
    """Where the policy decided for plain decoding, no forecast takes over before a round of it was run."""
    known = learning_policy()
    decided = replace(known, choices=(choice(PLAIN), choice(PLAIN, batch_size=8)))
    picks = World(keep={NGRAM: 0.8, CODE_DRAFT: 0.6}).play(Selector(decided), 500)
    first = next(number for number, pick in enumerate(picks) if pick.setup != PLAIN)
    assert picks[first].probe


def test_one_stall_changes_little() -> None:
    """One probe that takes ten seconds leaves drafts and probes possible."""
    selector, world = Selector(learning_policy()), World()
    while not world.play(selector, 1)[0].probe:
        pass
    pick = selector.choose()
    assert pick.probe
    assert selector.observe(RoundReport(pick, ((0, 0),), 10.0))
    picks = world.play(selector, 3000)
    assert share(picks[-500:], NGRAM8) > 0.8
    assert any(pick.probe for pick in picks[100:])


def test_catching_up_counts_as_a_loss() -> None:
    """A draft whose catching up would take more than is left is not switched to, and no window breaks the bound."""
    known = learning_policy()
    assert known.prior is not None
    times = tuple(replace(one, catch_up_s=0.0003 if one.draft == 1 else 0.0) for one in known.prior.round_times)
    slow = replace(known, prior=replace(known.prior, round_times=times))
    selector, world = Selector(slow), World()
    lost, before = [], PLAIN
    for number in range(6000):
        world.keep = {NGRAM: 0.0, CODE_DRAFT: 0.0 if number % 800 < 400 else 0.98}
        tokens, seconds = world.tokens, world.seconds
        pick = world.play(selector, 1, domain="code")[0]
        caught_up = 256 * 0.0003 if pick.setup.draft == CODE_DRAFT and before.draft != CODE_DRAFT and number else 0.0
        before = pick.setup
        lost.append((world.seconds - seconds + caught_up) / 0.01 - (world.tokens - tokens))
    assert max(sum(lost[first : first + 1000]) for first in range(len(lost) - 1000)) < 1000 * (1 / 0.98 - 1) + 8.0


def test_a_long_silence() -> None:
    """A domain that was not asked for millions of rounds is taken up again at the stored evidence."""
    selector, world = Selector(learning_policy()), World()
    world.play(selector, 50, domain="code")
    selector._now += 5_000_000
    assert world.play(selector, 50, domain="code")[-1].setup.draft == CODE_DRAFT
