"""`forget` deletes what it says and nothing else, and gives the space back."""

from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Infeasible
from store.evidence_store import EvidenceStore, Scope
from store.forget import forget
from tests.support import policies
from tests.support.cli import call
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts
from tests.support.policies import save_policy
from tests.support.servers import ask
from tuner.policy.policy import to_json

A4 = Setup(draft=DRAFT_A, length=4)
OTHER = replace(TARGET, name="other-target", digest="e" * 32)
ROWS = dict.fromkeys(("target_traces", "acceptance_traces", "lookup_traces"), 6)
ROWS |= {"sweeps": 1, "units": 6, "infeasible": 1, "runs": 1, "policies": 1}


def fill(evidence_store: EvidenceStore, target: object) -> None:
    """A row in every table: one run with six units, and a policy with a choice."""
    engine = FakeEngine()
    scope = Scope(target=target, environment=MACHINE, workload=GREEDY)  # type: ignore[arg-type]
    run_id = evidence_store.save_run(scope)
    for prompt in prompts(6):
        trace = evidence_store.save_target_trace(scope, prompt, engine.trace_target(GREEDY, prompt))
        for draft in (DRAFT_A, NGRAM):
            evidence_store.save_acceptance(scope, prompt, draft, engine.trace_draft(GREEDY, prompt, trace, draft, 4))
        samples = engine.run_together(GREEDY, (prompt,), (PLAIN, A4), "race 0")
        evidence_store.save_samples(scope, (prompt,), (PLAIN, A4), "race 0", samples)
    if target == TARGET:
        evidence_store.save_step_times(scope, (DRAFT_A, NGRAM), 4, engine.time_steps(GREEDY, 96, 4))
    evidence_store.save_infeasible(scope, Infeasible(setup=A4, reason="OutOfMemoryError", detail="3 GiB"))
    evidence_store.finish_run(run_id, {})
    save_policy(evidence_store, to_json(policies.policy()), scope.target, MACHINE)


def counts(evidence_store: EvidenceStore) -> dict[str, int]:
    tables = (*ROWS, "samples", "step_times", "choices", "models", "environments", "setups", "workloads")
    return {table: ask(evidence_store, f"SELECT count(*) FROM {table}")[0][0] for table in tables}


def test_a_target_is_forgotten_and_others_stay(evidence_store: EvidenceStore) -> None:
    """With everything below its rows; what nothing refers to any more goes too."""
    fill(evidence_store, OTHER)
    before = counts(evidence_store)
    fill(evidence_store, TARGET)
    full = counts(evidence_store)
    assert forget(evidence_store, target="fake-target", dry_run=True).rows == ROWS
    assert counts(evidence_store) == full
    forgotten = forget(evidence_store, target=TARGET.digest)
    assert (forgotten.rows, forgotten.targets) == (ROWS, (TARGET,))
    assert counts(evidence_store) == before
    assert evidence_store.latest_policy("other-target") is not None
    with pytest.raises(NotMeasuredError, match="knows no target 'fake-target'"):
        forget(evidence_store, target="fake-target")


def test_only_what_is_old_is_forgotten(evidence_store: EvidenceStore) -> None:
    """By the time at which a row was made."""
    fill(evidence_store, TARGET)
    ask(evidence_store, "UPDATE units SET measured_at = '2020-01-01T00:00:00.000000+00:00' WHERE id <= 2")
    assert forget(evidence_store, before="2021-01-01T00:00:00.000000+00:00").rows == {"units": 2}
    assert counts(evidence_store)["samples"] == 8
    assert forget(evidence_store, before="2021-01-01T00:00:00.000000+00:00").rows == {}


def test_space_is_given_back(path: Path) -> None:
    """The file is smaller afterwards."""
    with EvidenceStore.open(path) as evidence_store:
        scope = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
        for prompt in prompts(300):
            evidence_store.save_target_trace(scope, prompt, FakeEngine().trace_target(GREEDY, prompt))
    full = path.stat().st_size
    with EvidenceStore.open(path) as evidence_store:
        forget(evidence_store, target="fake-target")
    assert path.stat().st_size < full / 2


def test_the_command_says_what_it_deletes(tmp_path: Path) -> None:
    """With --dry-run nothing is deleted; without a target and a date nothing is done."""
    with EvidenceStore.open(tmp_path / "evidence.db") as evidence_store:
        fill(evidence_store, TARGET)
    said = call(tmp_path, "forget", "--target", "fake-target", "--dry-run")
    assert said.code == 0
    assert "would delete 6 target traces" in said.stdout
    assert call(tmp_path, "forget", "--before", "30d", "--json").document["rows"] == {}
    assert call(tmp_path, "forget").code == 2
    assert "--before 'soon': a date" in call(tmp_path, "forget", "--before", "soon").stderr
    assert call(tmp_path, "forget", "--target", "fake-target", "--json").document["rows"] == ROWS
    assert call(tmp_path, "forget", "--target", "fake-target").code == 3
