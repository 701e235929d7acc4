"""Serving code sees a replaced policy file at its next question, and never half of one."""

from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Draft, Setup
from profiles.records.errors import InputError, PolicyError
from tests.support.policies import CODE_DRAFT, NGRAM, choice, learning_policy, policy
from tuner.policy.policy import Policy, write
from tuner.selector.policy_file import PolicyFile
from tuner.selector.selector import Selector

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


def test_a_policy_of_other_drafts_is_not_taken(tmp_path: Path) -> None:
    """`drafts_of` is asked for every policy: refused, the old one holds; of other names, a new selector has them."""

    def drafts_of(new: Policy) -> list[str]:
        names = [draft.name for draft in new.prior.drafts if draft != CODE_DRAFT]
        if not names:
            raise InputError("nothing is loaded")
        return names

    path = tmp_path / "policy.json"
    stored = learning_policy()
    assert stored.prior is not None
    write(path, stored)
    live = PolicyFile(path, drafts_of=drafts_of)
    first = live.selector
    acceptance_of_code = tuple(replace(row, draft=0) for row in stored.prior.acceptance if row.draft == 1)
    times = tuple(replace(row, draft=row.draft and 0) for row in stored.prior.round_times if row.draft != 0)
    code_only = replace(stored.prior, drafts=(CODE_DRAFT,), acceptance=acceptance_of_code, round_times=times)
    write(path, replace(stored, prior=code_only, choices=(choice(PLAIN),)))
    assert live.selector is first
    assert str(live.error) == "nothing is loaded"
    other = Draft(kind="ngram", max_match=3, min_match=2)
    write(path, replace(stored, prior=replace(code_only, drafts=(other,)), choices=(choice(PLAIN),)))
    assert live.selector is not first
    assert live.error is None


def test_a_policy_that_no_selector_takes_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file makes the selector raise, serving goes on under the policy before it."""
    path = tmp_path / "policy.json"
    write(path, policy(choice(N2)))
    live = PolicyFile(path)
    calls = []

    def replaced(_: object, new: Policy) -> None:
        calls.append(new)
        raise ValueError("min() of nothing")

    monkeypatch.setattr(Selector, "replace", replaced)
    write(path, policy(choice(PLAIN)))
    for _ in range(3):
        assert live.selector.choose().setup == N2
    assert str(live.error) == "min() of nothing"
    assert len(calls) == 1
