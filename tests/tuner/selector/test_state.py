"""The selector finds the measured point that the policy's look-up does, or the nearest one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.records.core import Setup
from profiles.records.errors import InputError
from tests.support.policies import CODE_DRAFT, NGRAM, choice, policy
from tuner.selector.state import SelectorState

# ragged on purpose: batch 8 lacks the long context, code lacks batch 8, temperature 0.7 has one point
RAGGED = policy(
    choice(Setup(draft=CODE_DRAFT, length=5)),
    choice(Setup(draft=CODE_DRAFT, length=4), context_length=2048),
    choice(Setup(draft=NGRAM, length=2), batch_size=8),
    choice(Setup(draft=CODE_DRAFT, length=8), domain="code"),
    choice(Setup(draft=CODE_DRAFT, length=7), domain="code", batch_size=4, context_length=1024),
    choice(Setup(draft=NGRAM, length=3), domain="copy", temperature=0.7),
)

STATE = SelectorState(RAGGED, None, max_length=None, baseline="k0")


@given(
    batch_size=st.integers(1, 10),
    context_length=st.none() | st.integers(1, 2100) | st.sampled_from([512, 513, 1024, 1025, 2048, 2049]),
    domain=st.sampled_from([None, "code", "copy", "legal", "mixed"]),
    temperature=st.sampled_from([0.0, 5e-7, 0.7, 0.3, 1.0]),
)
def test_same_answers_as_the_policy(
    batch_size: int, context_length: int | None, domain: str | None, temperature: float
) -> None:
    """Between the measured points and beyond them; the nearest temperature, and the longest context."""
    stream = STATE.find(batch_size, context_length, domain, temperature)
    nearest = min((0.0, 0.7), key=lambda measured: abs(measured - temperature))
    answers = [
        RAGGED.look_up(batch_size=batch_size, context_length=length, domain=domain, temperature=nearest)
        for length in (context_length, None)
    ]
    points = [answer.choice.point for answer in answers if answer.matched]
    assert (stream and stream.operating_point) == (points[0] if points else None)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ((0, None, None, 0.0), "batch size 0: whole numbers from 1 are allowed"),
        ((1, -5, None, 0.0), "context -5: whole numbers from 1 are allowed"),
        ((1, "3", None, 0.0), "context '?3'?: whole numbers from 1 are allowed"),
        ((1, 2.5, None, 0.0), "context 2.5: whole numbers from 1 are allowed"),
        ((1, None, None, float("nan")), "temperature nan: allowed are 0"),
    ],
)
def test_impossible_question(question: tuple[int, Any, None, float], message: str) -> None:
    """A value that cannot exist raises an error that names it."""
    with pytest.raises(InputError, match=message):
        STATE.find(*question)
