"""Policies as files to ship: their names, which are written, and what they leave alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.records.errors import NotMeasuredError
from store.evidence_store import EvidenceStore
from tests.support import policies as made
from tests.support.cli import call, database
from tests.support.policies import save_policy
from tuner.deploy import policy_files
from tuner.policy import policy as policies


def test_names_never_collide(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """Alike names get their digests; a later policy of the same target and machine replaces its file only."""
    one = made.policy()
    models = [replace(one.target, name="a/b c"), replace(one.target, name="A_b:c", digest="cc" * 16)]
    for model in models:
        policy = replace(one, target=model)
        save_policy(evidence_store, policies.to_json(policy), policy.target, policy.environment)
    written = policy_files.export_policies(evidence_store, tmp_path / "out")
    assert len({path.name.lower() for path in written}) == 2
    assert all(
        path.name.lower().startswith("target=a_b_c,device_name=example_cpu,engine=torch-0.1.0,digest=")
        for path in written
    )
    assert {policies.read(path).target.run_digest for path in written} == {one.run_digest for one in models}
    assert policy_files.export_policies(evidence_store, tmp_path / "out") == written
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_only_those_asked_for(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """By target and machine as a bundle's rows; one that is not known is refused."""
    one = made.policy()
    models = [one.target, replace(one.target, name="other", digest="cc" * 16)]
    machines = [one.environment, replace(one.environment, device="other cpu")]
    for model in models:
        for machine in machines:
            save_policy(
                evidence_store, policies.to_json(replace(one, target=model, environment=machine)), model, machine
            )
    assert len(policy_files.export_policies(evidence_store, tmp_path / "all")) == 4
    asked: dict[str, Any] = {"targets": ["other"], "environments": ["other cpu"]}
    [path] = policy_files.export_policies(evidence_store, tmp_path / "one", **asked)
    assert policies.read(path).target.name == "other"
    assert policies.read(path).environment.device == "other cpu"
    with pytest.raises(NotMeasuredError, match="knows nothing of 'nosuch'"):
        policy_files.export_policies(evidence_store, tmp_path / "none", targets=["nosuch"])


def test_another_file_is_never_replaced(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """What lies under the name already, a policy of other weights or no policy at all, stays."""
    one = made.policy()
    save_policy(evidence_store, policies.to_json(one), one.target, one.environment)
    taken = tmp_path / policy_files.file_name(one)
    taken.write_text("not a policy")
    [path] = policy_files.export_policies(evidence_store, tmp_path)
    assert path != taken
    assert taken.read_text() == "not a policy"
    assert policies.read(path) == one


def test_without_a_policy(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """Nothing is made."""
    with pytest.raises(NotMeasuredError, match="no policy of these targets and machines to ship"):
        policy_files.export_policies(evidence_store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_asks_for_them(tmp_path: Path) -> None:
    """`--target` and `--environment` hold for `--policies` as they do for the bundle."""
    one = made.policy()
    with EvidenceStore.open(database(tmp_path)) as evidence_store:
        for model in (one.target, replace(one.target, name="other", digest="cc" * 16)):
            for machine in (one.environment, replace(one.environment, device="other cpu")):
                save_policy(
                    evidence_store, policies.to_json(replace(one, target=model, environment=machine)), model, machine
                )
    words = ("bundle", "pack", tmp_path / "b", "--policies", tmp_path / "out", "--target", "other")
    assert call(tmp_path, *words).code == 0
    assert [policies.read(path).target.name for path in (tmp_path / "out").iterdir()] == ["other", "other"]
    assert call(tmp_path, *words[:4], tmp_path / "one", *words[5:], "--environment", "other cpu").code == 0
    assert [policies.read(path).environment.device for path in (tmp_path / "one").iterdir()] == ["other cpu"]
