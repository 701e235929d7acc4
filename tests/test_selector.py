"""The selector answers exactly as the policy's look-up does, fast, without loading anything heavy."""

import subprocess
import sys
import timeit
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InputError
from profiles.terms import PLAIN, Setup
from tests.policies import CODE_DRAFT, NGRAM, choice, policy
from tuner.selector import Selector

ROOT = Path(__file__).resolve().parent.parent
# ragged on purpose: batch 8 lacks the long context, code lacks batch 8, temperature 0.7 has one anchor
RAGGED = policy(
    choice(Setup(draft=CODE_DRAFT, length=5)),
    choice(Setup(draft=CODE_DRAFT, length=4), context_length=2048),
    choice(Setup(draft=NGRAM, length=2), batch_size=8),
    choice(Setup(draft=CODE_DRAFT, length=8), domain="code"),
    choice(Setup(draft=CODE_DRAFT, length=7), domain="code", batch_size=4, context_length=1024),
    choice(Setup(draft=NGRAM, length=3), domain="copy", temperature=0.7),
)


@given(
    batch_size=st.integers(1, 10),
    context_length=st.none() | st.integers(1, 2100) | st.sampled_from([512, 513, 1024, 1025, 2048, 2049]),
    domain=st.sampled_from([None, "code", "copy", "law", "mixed"]),
    temperature=st.sampled_from([0.0, 5e-7, 0.7, 0.3, 1.0]),
)
def test_same_answers_as_the_policy(
    batch_size: int, context_length: int | None, domain: str | None, temperature: float
) -> None:
    """The table gives the answer of the rule itself, between the measured points and beyond them."""
    chosen = Selector(RAGGED).choose(
        batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
    )
    answer = RAGGED.look_up(
        batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
    )
    assert chosen == answer.choice.setup


def test_flagless_choice() -> None:
    """Without arguments: greedy, batch 1, all domains, the longest measured context."""
    assert Selector(RAGGED).choose().name == "family/draft-code k=4"
    assert Selector(policy()).choose() == PLAIN


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"batch_size": 0}, "batch size 0: whole numbers from 1 are allowed"),
        ({"context_length": -5}, "context -5: whole numbers from 1 are allowed"),
        ({"temperature": float("nan")}, "temperature nan: allowed are 0"),
    ],
)
def test_impossible_question(question: dict[str, object], message: str) -> None:
    """A value that cannot exist raises an error that names it."""
    with pytest.raises(InputError, match=message):
        Selector(RAGGED).choose(**question)  # type: ignore[arg-type]


def test_choosing_takes_microseconds() -> None:
    """One choice takes under 50 microseconds (best of five, so that a busy machine does not fail it)."""
    selector = Selector(RAGGED)
    best_s = min(timeit.repeat(lambda: selector.choose(batch_size=3, context_length=700, domain="code"), number=500))
    assert best_s / 500 < 50e-6


def test_serving_code_loads_nothing_heavy() -> None:
    """In a fresh process, importing the selector and the policy loads no numeric, model, search or store library."""
    heavy = "{'torch', 'transformers', 'optuna', 'sqlalchemy', 'sklearn', 'numpy', 'scipy', 'matplotlib', 'rich'}"
    program = f"import sys, tuner.selector, tuner.policy; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
