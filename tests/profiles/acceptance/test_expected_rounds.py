"""The walk over a trace: literal cases, the check value of house.md, and agreement with real rounds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.acceptance.expected_rounds import combine, expected_rounds
from profiles.acceptance.rates import acceptance_by_position, acceptance_length, acceptance_rate
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.evidence import AcceptanceTrace, LookupTrace, TargetTrace
from profiles.stats import median

CHECK = {(2, 0): 3, (2, 1): 2, (2, 2): 5}


def _trace(size: int, ended: bool = False) -> TargetTrace:
    return TargetTrace(
        prompt_digest="p",
        token_ids=tuple(range(size)),
        target_probs=(1.0,) * size,
        logit_gaps=(1.0,) * size,
        ended=ended,
    )


def _kept(*accept_probs: float) -> AcceptanceTrace:
    return AcceptanceTrace(
        prompt_digest="p", draft_digest="d", accept_probs=accept_probs, confidences=(1.0,) * len(accept_probs)
    )


def test_check_value() -> None:
    """Ten rounds, twelve accepted of twenty drafted give the known rates."""
    assert acceptance_rate(CHECK) == pytest.approx(0.60)
    assert acceptance_length(CHECK) == pytest.approx(2.2)
    assert acceptance_by_position(CHECK) == [(1, 10, 0.7), (2, 10, 0.5)]


def test_no_rounds_give_no_figures() -> None:
    """No data is None or an error, never 0."""
    assert acceptance_rate({}) is None
    assert acceptance_length({}) is None
    with pytest.raises(InputError):
        median([])


def test_greedy_walk_by_hand() -> None:
    """Rounds start after a rejection or after the target token; the last one drafts what is left."""
    walked = expected_rounds(_trace(10), _kept(0, 1, 1, 0, 1, 1, 1, 0, 1, 1), 2, 10)
    assert walked.rounds == {(2, 2): 2.0, (2, 0): 1.0, (1, 1): 1.0}
    assert walked.shapes == {(3, 2, 2): 3.0, (2, 1, 2): 1.0}


def _looked_up(longest: int, proposed: dict[int, tuple[int, int]]) -> LookupTrace:
    pairs = [proposed.get(start, proposed.get(-1, (0, 0))) for start in range(20)]
    counts = {"proposed": tuple(pair[0] for pair in pairs), "accepted": tuple(pair[1] for pair in pairs)}
    return LookupTrace(prompt_digest="p", draft_digest="d", max_length=longest, **counts)


def test_a_look_up_before_a_recorded_head() -> None:
    """Its rounds have the look-up's own length; both must be traced that far."""
    lookup, head = _looked_up(8, {3: (8, 6)}), _looked_up(3, {-1: (3, 1)})
    walked = expected_rounds(_trace(20), combine([lookup, head]), 2, 20, past_end=True)
    assert walked.rounds == {(2, 1): 6.0, (8, 6): 1.0}
    assert walked.shapes == {(3, 0, 0): 6.0, (9, 0, 0): 1.0}
    for parts, length in (([lookup, head], 4), ([_looked_up(4, {3: (4, 4)}), head], 2)):
        with pytest.raises(NotMeasuredError):
            expected_rounds(_trace(20), combine(parts), length, 20, past_end=True)


def test_accepted_end_token_ends_the_walk_without_a_target_token() -> None:
    """Tokens drafted after the end count as drafted, not as accepted."""
    walked = expected_rounds(_trace(4, ended=True), _kept(0, 1, 1, 1), 8, 64)
    assert walked.rounds == {(8, 3): 1.0}


def test_end_token_from_the_target_ends_the_walk() -> None:
    """The target's own end token closes the round that rejected before it."""
    walked = expected_rounds(_trace(4, ended=True), _kept(0, 1, 1, 0), 8, 64)
    assert walked.rounds == {(8, 2): 1.0}


def test_plain_decoding_walks_one_token_a_round() -> None:
    """Every token but the first is a round with nothing proposed."""
    assert expected_rounds(_trace(7), None, 0, 7).rounds == {(0, 0): 6.0}
    assert expected_rounds(_trace(1), None, 0, 7).rounds == {}


def test_lookup_walk_takes_plain_steps_where_nothing_matches() -> None:
    """An n-gram round verifies what it proposed plus one token, or is a plain step."""
    lookup = LookupTrace(
        prompt_digest="p", draft_digest="d", max_length=4, proposed=(0, 0, 3, 0, 0, 2), accepted=(0, 0, 2, 0, 0, 1)
    )
    assert expected_rounds(_trace(6), lookup, 4, 6).rounds == {(0, 0): 2.0, (3, 2): 1.0}
    assert expected_rounds(_trace(6), lookup, 1, 6).rounds == {(0, 0): 3.0, (1, 1): 1.0}
    with pytest.raises(NotMeasuredError, match="up to 4, not 5"):
        expected_rounds(_trace(6), lookup, 5, 6)


def test_a_draft_needs_a_length() -> None:
    """Length 0 belongs to plain decoding alone."""
    with pytest.raises(InputError, match="length 0"):
        expected_rounds(_trace(3), _kept(0, 1, 1), 0, 3)


@given(
    keep=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=40),
    length=st.integers(1, 9),
    ended=st.booleans(),
)
def test_expected_walk_emits_every_token(keep: list[float], length: int, ended: bool) -> None:
    """Whatever the keep probabilities, accepted plus target tokens add up to the trace, less a final target token."""
    size = len(keep)
    walked = expected_rounds(_trace(size, ended), _kept(*keep), length, size + 5 if ended else size)
    emitted = sum((kept + 1) * count for (_, kept), count in walked.rounds.items())
    assert size - 1 - 1e-6 <= emitted <= size + 1e-6
    if not ended:
        assert emitted == pytest.approx(size - 1)


@given(keep=st.lists(st.integers(0, 1), min_size=2, max_size=30), length=st.integers(1, 8))
def test_greedy_walk_is_a_run_of_whole_rounds(keep: list[int], length: int) -> None:
    """With keep probabilities of 0 and 1 every count is whole and the walk equals a plain loop."""
    size = len(keep)
    rounds: dict[tuple[int, int], float] = {}
    start = 1
    while start < size:
        asked = min(length, size - start - 1)
        accepted = 0
        while accepted < asked and keep[start + accepted]:
            accepted += 1
        rounds[asked, accepted] = rounds.get((asked, accepted), 0.0) + 1.0
        start += accepted + 1
    assert dict(expected_rounds(_trace(size), _kept(*map(float, keep)), length, size).rounds) == rounds


def test_unused_first_position_changes_nothing() -> None:
    """Token 0 comes from the prefill, whatever the draft would have said there."""
    trace = _trace(5)
    acceptance = _kept(0, 1, 0, 1, 1)
    assert expected_rounds(trace, acceptance, 2, 5) == expected_rounds(
        trace, replace(acceptance, accept_probs=(1.0, 1, 0, 1, 1)), 2, 5
    )
