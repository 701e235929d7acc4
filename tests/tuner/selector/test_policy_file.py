"""Serving code sees a replaced policy file at its next question, and never half of one."""

from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import PolicyError
from tests.support.policies import NGRAM, choice, policy
from tuner.policy.policy import write
from tuner.selector.policy_file import PolicyFile

N2 = Setup(draft=NGRAM, length=2)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    """The same selector answers by the new policy, so that what it learned is not lost."""
    path = tmp_path / "policy.json"
    write(path, policy(choice(PLAIN)))
    live = PolicyFile(path)
    first = live.selector
    assert first.choose().setup == PLAIN
    write(path, policy(choice(N2)))
    assert live.selector is first
    assert first.choose().setup == N2


def test_a_bad_file_leaves_the_last_one_in_force(tmp_path: Path) -> None:
    """A broken or missing file is told, and mended by the next good one."""
    path = tmp_path / "policy.json"
    write(path, policy(choice(N2)))
    live = PolicyFile(path)
    path.write_text("{}")
    assert live.selector.choose().setup == N2
    assert "created" in str(live.error)
    path.unlink()
    assert live.selector.choose().setup == N2
    assert "cannot be read" in str(live.error)
    write(path, policy(choice(PLAIN)))
    assert live.selector.choose().setup == PLAIN
    assert live.error is None


def test_the_first_file_must_be_good(tmp_path: Path) -> None:
    """Serving does not begin without a policy."""
    with pytest.raises(PolicyError, match="cannot be read"):
        PolicyFile(tmp_path / "policy.json")
