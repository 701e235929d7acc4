"""What a deploy script is told: the choice, how well it matches, and what would measure it."""

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from profiles.hardware.device import Machine, drop_unknown
from profiles.records.core import PLAIN, Environment, Model, Setup
from profiles.records.errors import NotMeasuredError, PolicyError
from store.evidence_store import EvidenceStore
from tests.support.fakes import DRAFT_A, MACHINE, NGRAM, TARGET
from tests.support.policies import choice, save_policy
from tuner.deploy.lookup import LookupResult, Query, lookup
from tuner.deploy.match import LEVELS
from tuner.policy.policy import Policy, to_json

A4 = Setup(draft=DRAFT_A, length=4)
N2 = Setup(draft=NGRAM, length=2)
HERE = drop_unknown(asdict(MACHINE))
H100 = replace(
    MACHINE,
    device="NVIDIA H100 80GB HBM3",
    memory_bytes=79 * 2**30,
    driver="580.65",
    cuda="13.0",
    compute_capability="9.0",
    memory_bandwidth_bytes_s=3_350_000_000_000,
)
PCIE = replace(H100, device="NVIDIA H100 PCIe", memory_bandwidth_bytes_s=2_000_000_000_000)
H200 = replace(H100, device="NVIDIA H200", memory_bytes=140 * 2**30, memory_bandwidth_bytes_s=4_800_000_000_000)
L40S = replace(H100, device="NVIDIA L40S", memory_bytes=45 * 2**30, compute_capability="8.9")
minutes = itertools.count()


def keep(
    evidence_store: EvidenceStore, environment: Environment, setup: Setup = A4, target: Model = TARGET, **point: object
) -> None:
    """Save a policy of one choice, made on that machine."""
    made = Policy(
        created=f"2026-11-22T08:{next(minutes) % 60:02}:00+00:00",
        target=target,
        environment=environment,
        choices=(choice(setup, **point),),
    )
    save_policy(evidence_store, to_json(made), target, environment)


def ask(evidence_store: EvidenceStore, here: Environment | Machine, **query: object) -> LookupResult:
    machine = drop_unknown(asdict(here)) if isinstance(here, Environment) else here
    return lookup(evidence_store, Query(**query), machine)  # type: ignore[arg-type]


class TestLevels:
    @pytest.mark.parametrize(
        ("here", "level"),
        [
            (MACHINE, "exact"),
            (replace(MACHINE, torch="2.14.0"), "version"),
            (replace(MACHINE, engine="vllm"), "engine"),
            (replace(MACHINE, threads=8), "family"),
        ],
    )
    def test_the_choice_comes_with_its_level(
        self, evidence_store: EvidenceStore, here: Environment, level: str
    ) -> None:
        """One measured machine: the same choice, and how far what was measured is from what was asked."""
        keep(evidence_store, MACHINE)
        found = ask(evidence_store, here)
        assert (found.level, found.answer.choice.setup) == (level, A4)
        assert (found.caveat is None) == (level == "exact")

    def test_the_best_match_answers(self, evidence_store: EvidenceStore) -> None:
        """Of four machines the same one answers; without it one of its family; without that the nearest bandwidth."""
        for environment, setup in ((H200, A4), (PCIE, N2), (L40S, N2)):
            keep(evidence_store, environment, setup)
        assert ask(evidence_store, PCIE).level == "exact"
        assert ask(evidence_store, H100).level == "family"
        assert ask(evidence_store, H100).answer.choice.setup == N2
        gh200 = replace(H100, device="NVIDIA GH200 480GB", memory_bandwidth_bytes_s=4_000_000_000_000)
        found = ask(evidence_store, gh200)
        assert (found.level, found.answer.choice.setup) == ("capability", A4)
        assert found.match is not None
        assert "device is NVIDIA GH200 480GB, measured on NVIDIA H200" in (found.caveat or "")

    def test_nothing_near_is_plain_decoding(self, evidence_store: EvidenceStore) -> None:
        """A device of another kind gets plain decoding, what was measured, and the command that would measure it."""
        keep(evidence_store, H100)
        found = ask(evidence_store, L40S)
        assert (found.level, found.answer.choice.setup, found.answer.matched) == ("none", PLAIN, False)
        assert found.answer.rule == "fake-target was tuned only on NVIDIA H100 80GB HBM3"
        assert found.policy is None
        assert found.advice == "python tune.py run --target fake-target --dtype float32 --prompts PROMPTS.jsonl"

    def test_of_one_machine_the_latest_policy_answers(self, evidence_store: EvidenceStore) -> None:
        """By the time it was saved."""
        keep(evidence_store, MACHINE)
        keep(evidence_store, MACHINE, N2)
        assert ask(evidence_store, MACHINE).answer.choice.setup == N2

    def test_levels_can_be_required(self, evidence_store: EvidenceStore) -> None:
        """A family match reaches family and capability, not version."""
        keep(evidence_store, H100)
        found = ask(evidence_store, PCIE)
        reached = [level for level in LEVELS if found.reaches(level)]
        assert reached == ["family", "capability", "none"]


class TestCoverage:
    def test_beyond_the_largest_is_plain(self, evidence_store: EvidenceStore) -> None:
        """Up to the largest measured batch the choice holds; beyond it nothing does, and the level says so."""
        keep(evidence_store, MACHINE, batch_size=8)
        assert ask(evidence_store, MACHINE, batch_size=3).answer.choice.setup == A4
        found = ask(evidence_store, MACHINE, batch_size=9)
        assert (found.level, found.answer.choice.setup) == ("none", PLAIN)
        assert found.advice == (
            "python tune.py run --target fake-target --dtype float32 --draft draft-a --prompts PROMPTS.jsonl "
            "--batch-size 9"
        )
        assert ask(evidence_store, MACHINE, batch_size=65).advice is None

    def test_other_versions_cover_what_this_one_does_not(self, evidence_store: EvidenceStore) -> None:
        """After an upgrade only batch 1 was tuned: for batch 4 the older version's policy answers, as `version`."""
        keep(evidence_store, replace(MACHINE, torch="2.12.0"), N2, batch_size=4)
        keep(evidence_store, MACHINE, A4)
        assert (ask(evidence_store, MACHINE).level, ask(evidence_store, MACHINE).answer.choice.setup) == ("exact", A4)
        found = ask(evidence_store, MACHINE, batch_size=4)
        assert (found.level, found.answer.choice.setup) == ("version", N2)

    def test_another_device_does_not_extend_a_measured_one(self, evidence_store: EvidenceStore) -> None:
        """Beyond what was measured here, a larger batch measured on a sister card is not taken."""
        keep(evidence_store, PCIE, N2, batch_size=64)
        keep(evidence_store, H100, A4)
        assert ask(evidence_store, H100, batch_size=16).answer.choice.setup == PLAIN

    def test_without_a_temperature_the_tuned_one_is_asked(self, evidence_store: EvidenceStore) -> None:
        """A policy of temperature 0.8 answers a question that names none, and not one at 0."""
        keep(evidence_store, MACHINE, temperature=0.8)
        assert ask(evidence_store, MACHINE).level == "exact"
        assert ask(evidence_store, MACHINE, temperature=0.0).level == "none"

    def test_the_target_is_found_by_name_and_digest(self, evidence_store: EvidenceStore) -> None:
        """Another name is refused by name."""
        keep(evidence_store, MACHINE)
        for name in (TARGET.name, TARGET.digest, TARGET.run_digest):
            assert ask(evidence_store, MACHINE, target=name).level == "exact"
        with pytest.raises(NotMeasuredError, match="does not know target 'nosuch'"):
            ask(evidence_store, MACHINE, target="nosuch")

    def test_a_model_that_may_have_been_moved_is_known_by_its_old_name(
        self, evidence_store: EvidenceStore, tmp_path: Path
    ) -> None:
        """A look-up reads no weights, so it cannot know a folder that no run has seen."""
        keep(evidence_store, MACHINE)
        with pytest.raises(NotMeasuredError, match=r"run `tune.py run` first; a moved model has its old name"):
            ask(evidence_store, MACHINE, target=str(tmp_path))

    def test_an_empty_store_is_told(self, evidence_store: EvidenceStore) -> None:
        """There is nothing to fall back from."""
        with pytest.raises(NotMeasuredError, match=r"does not know any target: run `tune.py run` first"):
            ask(evidence_store, MACHINE)


def test_below_exact_nothing_is_called_proven(evidence_store: EvidenceStore) -> None:
    """Not in the answer and not in what exporters get; on this machine it stays proven."""
    keep(evidence_store, H100)
    assert ask(evidence_store, H100).answer.choice.proven
    found = ask(evidence_store, PCIE)
    assert not found.answer.choice.proven
    assert not found.deployment().choice.proven


def test_an_undecided_choice_covers_nothing(evidence_store: EvidenceStore) -> None:
    """A run whose budget ended first leaves plain decoding that nobody measured: that is no match."""
    keep(evidence_store, MACHINE, PLAIN, evidence=())
    found = ask(evidence_store, MACHINE)
    assert (found.level, found.answer.matched) == ("none", False)
    assert found.answer.rule == "the run ended before this was decided"


def test_the_temperature_is_settled_once(evidence_store: EvidenceStore) -> None:
    """The best match's temperature is asked of the others too: a policy at 0.8 does not answer a greedy question."""
    keep(evidence_store, replace(MACHINE, torch="2.12.0"), N2, batch_size=4, temperature=0.8)
    keep(evidence_store, MACHINE, A4)
    assert ask(evidence_store, MACHINE, batch_size=4).level == "none"


def test_a_namesake_tuned_elsewhere_hides_nothing(evidence_store: EvidenceStore) -> None:
    """Of two targets of one name the one that was tuned on this machine answers, though the other is newer."""
    keep(evidence_store, MACHINE, A4)
    keep(evidence_store, L40S, N2, replace(TARGET, dtype="bfloat16"))
    found = ask(evidence_store, MACHINE, target=TARGET.name)
    assert (found.level, found.target) == ("exact", TARGET)


def test_a_carried_target_is_found_by_its_path(evidence_store: EvidenceStore) -> None:
    """Packed under a path, merged as `imported:`, asked for by the path or its last part."""
    keep(evidence_store, MACHINE, A4, replace(TARGET, name="imported:llama"))
    for name in ("imported:llama", "llama", "/models/llama"):
        assert ask(evidence_store, MACHINE, target=name).level == "exact"


@pytest.mark.parametrize("name", ["thin", "link", "./link/", "link.gguf"])
def test_a_target_is_found_by_its_path_and_by_a_link(
    evidence_store: EvidenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The answer is that of the directory, from wherever it is asked; an older store has the link itself."""
    (tmp_path / "thin").mkdir()
    (tmp_path / "link").symlink_to("thin")
    stored = tmp_path / (name if name.endswith(".gguf") else "thin")
    keep(evidence_store, MACHINE, A4, replace(TARGET, name=str(stored)))
    monkeypatch.chdir(tmp_path)
    assert ask(evidence_store, MACHINE, target=name).level == "exact"
    assert evidence_store.latest_policy(name) is not None


def test_traits_that_became_known_are_kept(evidence_store: EvidenceStore) -> None:
    """A machine first saved without its compute capability gets it from the next save of the same machine."""
    keep(evidence_store, replace(H100, compute_capability=None, memory_bandwidth_bytes_s=None))
    assert ask(evidence_store, H200).level == "none"
    keep(evidence_store, H100)
    assert ask(evidence_store, H200).level == "capability"


def test_damaged_policies_are_told(evidence_store: EvidenceStore) -> None:
    """A stored policy that is none names the store."""
    keep(evidence_store, MACHINE)
    save_policy(evidence_store, "{}", TARGET, MACHINE)
    with pytest.raises(PolicyError, match="the policy in store"):
        ask(evidence_store, MACHINE)
