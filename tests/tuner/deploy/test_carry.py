"""A bundle carried to a clean store on another machine: match levels, by the commands."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from profiles.records.core import Setup
from store.evidence_store import EvidenceStore
from tests.support.cli import call, database
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, FakeEngine, prompts
from tests.tuner.deploy import test_lookup
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.policy.policy import from_json
from tuner.run import TuningSession, tune

H100, PCIE, CPU = (replace(one, engine="draftpick-torch") for one in (test_lookup.H100, test_lookup.PCIE, MACHINE))


class OnH100(FakeEngine):
    """The fake engine on a made-up H100."""

    def __init__(self) -> None:
        super().__init__(keep=0.95)
        self.environment = H100
        self.drafts = (DRAFT_A, NGRAM)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store elsewhere that got a bundle of a run on an H100."""
    there, here = tmp_path_factory.mktemp("there"), tmp_path_factory.mktemp("here")
    with EvidenceStore.open(database(there)) as evidence_store:
        tune(OnH100(), [(GREEDY, prompts(40))], TuningSession.of(evidence_store), Options(lengths=(1, 2, 4)), Watch())
    assert call(there, "bundle", "pack", there / "b.draftpick").code == 0
    assert call(here, "bundle", "merge", there / "b.draftpick").code == 0
    return here


def described(folder: Path, **fields: object) -> Path:
    path = folder / "machine.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "level", "code"),
    [
        (asdict(H100), "exact", 0),
        (asdict(H100) | {"torch": "2.14.0"}, "version", 7),
        (asdict(PCIE), "family", 7),
        (asdict(H100) | {"device": "NVIDIA H200", "memory_bytes": 140 * 2**30}, "capability", 7),
        (asdict(CPU), "none", 7),
    ],
)
def test_the_levels_on_the_other_machine(
    carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], level: str, code: int
) -> None:
    """Every level by the documented override; only exact passes `--require exact`, the others print nothing."""
    known = {name: value for name, value in fields.items() if value is not None or name in ("driver", "cuda")}
    monkeypatch.setenv("DRAFTPICK_ENVIRONMENT", str(described(tmp_path, **known)))
    said = call(carried, "lookup", "--json")
    answer = said.document["answer"]
    assert (said.code, answer["match"]["level"]) == (0, level)
    assert (answer["choice"]["draft"] is None) == (level == "none")
    required = call(carried, "lookup", "--require", "exact")
    assert required.code == code
    assert (required.stdout == "") == (code == 7)


def test_the_level_of_another_engine(carried: Path, tmp_path: Path) -> None:
    """What torch measured on this very machine, asked for vLLM: emitted with its label, and not exact."""
    known = {name: value for name, value in asdict(H100).items() if value is not None}
    machine = described(tmp_path, **known)
    words = ("lookup", "--environment", machine, "--format", "vllm", "--engine-version", "0.33.0")
    said = call(carried, *words, "--require", "engine")
    assert said.code == 0
    assert said.stdout.startswith("--speculative-config '{")
    assert "match is engine" in said.stderr
    assert ": measured on torch\n" in said.stderr
    assert call(carried, *words, "--require", "version").code == 7


def test_the_policy_came_along(carried: Path) -> None:
    """Its alternatives and the machine's traits included."""
    with EvidenceStore.open_read_only(database(carried)) as evidence_store:
        policy = from_json(evidence_store.latest_policy() or "")
    assert policy.environment == H100
    assert Setup(draft=DRAFT_A, length=4) in [one.setup for one in policy.choices[0].alternatives]


def test_a_merged_policy_has_no_file_and_its_own_run(carried: Path, tmp_path: Path) -> None:
    """The document names no file that is not there; `explain` tells of the run on the policy's machine."""
    known = {name: value for name, value in asdict(H100).items() if value is not None}
    said = call(carried, "lookup", "--json", "--environment", described(tmp_path, **known))
    assert said.document["policy"] is None
    assert said.document["cost"]["measured_units"] > 0
    assert "draft-a k=" in call(carried, "explain").stdout
