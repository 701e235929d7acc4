"""The plan that `lookup` offers where nothing was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.builtin import TARGET
from profiles.records.errors import InputError
from tests.support.cli import call
from tests.support.policies import learning_policy
from tuner.deploy.lookup import Query
from tuner.deploy.offer import offer_plan
from tuner.policy.policy import Policy, to_json

H100 = {"device": "NVIDIA H100 80GB HBM3", "device_count": 1, "engine": "vllm"}


def a_policy(target: str = TARGET) -> Policy:
    policy = learning_policy()
    return replace(policy, target=replace(policy.target, name=target))


def test_the_plan_has_the_measured_acceptance_of_drafts_that_it_can_price() -> None:
    plan = offer_plan(a_policy("meta-llama/Llama-3.1-8B"), Query(batch_size=4), H100)
    assert plan["status"] == "planned"
    assert {row["draft"] for row in plan["setups"]} == {"ngram:max=4,min=2"}  # the other's config is nowhere
    by_k = {row["k"]: row for row in plan["setups"]}
    assert by_k[8]["tokens_per_round"] == pytest.approx(a_policy().prior.acceptance[0].mean_tokens[7], rel=1e-3)  # type: ignore[union-attr]
    assert {row["batch_size"] for row in plan["setups"]} == {4}


@pytest.mark.parametrize(
    ("policy", "machine", "query"),
    [
        (a_policy("family/target"), H100, {}),
        (replace(a_policy(), prior=None), H100, {}),
        (a_policy(), {**H100, "device": "Example CPU"}, {}),
        (a_policy(), H100, {"temperature": 0.7}),
    ],
)
def test_what_cannot_be_planned_is_refused(policy: Policy, machine: dict[str, object], query: dict[str, float]) -> None:
    with pytest.raises(InputError):
        offer_plan(policy, Query(**query), machine)  # type: ignore[arg-type]


def test_lookup_labels_it_planned_and_answers_as_before(tmp_path: Path) -> None:
    policy, machine = tmp_path / "policy.json", tmp_path / "machine.json"
    policy.write_text(to_json(a_policy()))
    command = ("lookup", "--policy", policy, "--environment", machine, "--engine", "vllm")
    for device, status in (("NVIDIA H100", "planned"), ("Example GPU", "not planned")):
        machine.write_text(json.dumps({**H100, "device": device}))
        done = call(tmp_path, *command, "--json")
        answer = done.document["answer"]
        assert (done.document["plan"]["status"], answer["proven"]) == (status, False)
        assert answer["choice"]["draft"] is None
    assert done.document["plan"]["reason"]
    machine.write_text(json.dumps(H100))
    assert "planned, never proven: ngram" in call(tmp_path, *command).stderr
    required = call(tmp_path, *command, "--require", "family")
    assert (required.code, required.stdout) == (7, "")
