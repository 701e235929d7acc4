"""A bundle carries a store whole, merging it twice changes nothing, and the store's own evidence always stays."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Infeasible
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.support import policies as made
from tests.support.bundles import ELSEWHERE, SCOPE, fill, named, resealed, save_sample, update
from tests.support.cli import Said, assert_refused, call, content
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts, sql
from tests.support.policies import save_policy
from tuner.bundle import bundle
from tuner.policy import policy as policies

A_PATH = "/home/someone/my models/fake-target"
RELEASED_0001 = ROOT / "tests" / "assets" / "store-0001.sqlite"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run on one machine, its target named by a path."""
    folder = tmp_path_factory.mktemp("full")
    with EvidenceStore.open(folder / "evidence.db") as evidence_store:
        fill(evidence_store, target=named(A_PATH))
    return folder


@pytest.fixture(scope="module")
def packed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That store's bundle."""
    path = tmp_path_factory.mktemp("packed") / "one.bundle"
    with EvidenceStore.open(store / "evidence.db") as evidence_store:
        bundle.pack(evidence_store, path)
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Any:
    """An open store without a row."""
    with EvidenceStore.open(tmp_path / "empty" / "evidence.db") as evidence_store:
        yield evidence_store


class TestThereAndBack:
    def test_a_clean_store_gets_everything(
        self, store: Path, packed: Path, empty: EvidenceStore, tmp_path: Path
    ) -> None:
        """Every row arrives, and packing it again gives the same bytes."""
        merged = bundle.merge(empty, packed)
        assert (merged.stored, merged.unlike) == ({}, {})
        for table in (*merged.added, "samples", "step_times", "choices"):
            query = f"SELECT count(*) FROM {table}"
            assert sql(empty.database.path, query) == sql(store / "evidence.db", query), table
        assert {"models", "runs", "target_traces", "sweeps", "units", "infeasible", "policies"} <= set(merged.added)
        bundle.pack(empty, tmp_path / "again.bundle")
        assert (tmp_path / "again.bundle").read_bytes() == packed.read_bytes()

    def test_the_evidence_answers(self, packed: Path, empty: EvidenceStore) -> None:
        """Traces, timings, the policy and the run's outcome are found as if they had been measured here."""
        bundle.merge(empty, packed)
        fake = FakeEngine(keep=0.95)
        sizes = "SELECT DISTINCT context_length, max_length FROM sweeps"
        [(context_length, max_length)] = sql(empty.database.path, sizes)
        times = empty.find_step_times(SCOPE, (DRAFT_A,), context_length=context_length, max_length=max_length)
        assert times is not None
        traced = {digest for (digest,) in sql(empty.database.path, "SELECT prompt_digest FROM target_traces")}
        prompt = next(prompt for prompt in prompts(30) if prompt.digest in traced)
        trace = fake.trace_target(GREEDY, prompt)
        assert empty.find_target_trace(SCOPE, prompt) == trace
        acceptance = fake.trace_draft(GREEDY, prompt, trace, DRAFT_A, 2)
        assert empty.find_acceptance(SCOPE, prompt, DRAFT_A, 2) == acceptance
        text = empty.latest_policy("imported:fake-target", MACHINE)
        assert text is not None
        assert policies.from_json(text).headline.proven
        assert empty.latest_outcome(TARGET, MACHINE)["cost"]["measured_units"] > 0

    def test_a_second_merge_changes_nothing(self, packed: Path, store: Path, tmp_path: Path) -> None:
        """Neither where it was merged before nor in the packed store, whose names are others."""
        shutil.copytree(store, tmp_path / "copy")
        before = content(tmp_path / "copy")
        with EvidenceStore.open(tmp_path / "copy" / "evidence.db") as evidence_store:
            assert bundle.merge(evidence_store, packed).added == {}
        assert content(tmp_path / "copy") == before

    def test_two_machines_are_joined(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """The second bundle adds what the first does not have."""
        with EvidenceStore.open(tmp_path / "other.db") as evidence_store:
            fill(evidence_store, ELSEWHERE)
            bundle.pack(evidence_store, tmp_path / "two.bundle")
        bundle.merge(empty, packed)
        second = bundle.merge(empty, tmp_path / "two.bundle")
        assert second.added["policies"] == second.added["runs"] == 1
        assert "target_traces" not in second.added
        assert sql(empty.database.path, "SELECT count(DISTINCT environment_digest) FROM policies") == [(2,)]

    def test_a_part_can_be_packed(self, tmp_path: Path, empty: EvidenceStore) -> None:
        """One target, with the machines, setups and prompts of its rows alone."""
        other = replace(TARGET, name="other-target", digest="e" * 32)
        with EvidenceStore.open(tmp_path / "some.db") as evidence_store:
            save_sample(evidence_store, 0)
            evidence_store.save_run(replace(SCOPE, target=other, environment=ELSEWHERE), prompts(3))
            trace = FakeEngine().trace_target(GREEDY, prompts(2)[1])
            evidence_store.save_target_trace(replace(SCOPE, target=other), prompts(2)[1], trace)
            evidence_store.save_infeasible(
                replace(SCOPE, target=other),
                Infeasible(setup=Setup(draft=NGRAM, length=2), reason="EngineError", detail=""),
            )
            contents = bundle.pack(evidence_store, tmp_path / "a", ["fake-target"])
            counts = dict.fromkeys(("models", "environments", "prompts", "workloads", "setups", "units", "samples"), 1)
            assert contents.rows == counts
            with pytest.raises(NotMeasuredError, match="knows nothing of 'nosuch'"):
                bundle.pack(evidence_store, tmp_path / "b", ["nosuch"])
        with pytest.raises(NotMeasuredError, match="has nothing to pack"):
            bundle.pack(empty, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_runs_that_never_ended_stay(self, tmp_path: Path, packed: Path, empty: EvidenceStore) -> None:
        """A run that is under way or was killed is not packed; its evidence is."""
        num_units = bundle.merge(empty, packed).added["units"]
        empty.save_run(SCOPE)
        save_sample(empty, 0)
        contents = bundle.pack(empty, tmp_path / "b")
        assert (contents.rows["runs"], contents.rows["units"]) == (1, num_units + 1)
        assert contents.left_out == {}

    def test_an_older_store_packs(self, tmp_path: Path) -> None:
        """A store of schema 0001 is upgraded and packed."""
        shutil.copy(RELEASED_0001, tmp_path / "old.sqlite")
        with EvidenceStore.open(tmp_path / "old.sqlite") as evidence_store:
            contents = bundle.pack(evidence_store, tmp_path / "0001")
            assert contents.rows["units"] > 0
            assert bundle.merge(evidence_store, tmp_path / "0001").added == {}

    def test_no_path_leaves_the_machine(self, store: Path, packed: Path) -> None:
        """A model named by a path gets the path's last part and a mark; the store keeps the name."""
        assert "someone" in "".join(content(store))
        assert b"someone" not in packed.read_bytes()
        contents = bundle.inspect(packed)
        assert [model.name for model in contents.targets] == ["imported:fake-target"]
        assert contents.drafts == ("draft-a",)


class TestOddRows:
    """An odd row of a store never keeps the others from being packed."""

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE runs SET finished_at = '2001-01-01T00:00:00.000000+00:00'",
            "UPDATE units SET measured_at = '2999-01-01T00:00:00.000000+00:00'",
            "UPDATE prompts SET domain = '/r/python'",
        ],
    )
    def test_it_is_packed(self, store: Path, empty: EvidenceStore, tmp_path: Path, change: str) -> None:
        """A clock that was set back or runs ahead, and a domain with a slash."""
        shutil.copytree(store, tmp_path / "copy")
        sql(tmp_path / "copy" / "evidence.db", change)
        with EvidenceStore.open(tmp_path / "copy" / "evidence.db") as evidence_store:
            assert bundle.pack(evidence_store, tmp_path / "b").left_out == {}
        [(num_units,)] = sql(store / "evidence.db", "SELECT count(*) FROM units")
        merged = bundle.merge(empty, tmp_path / "b")
        assert merged.added["units"] == num_units
        assert sql(empty.database.path, "SELECT count(*) FROM units WHERE measured_at > '2998'") == [(0,)]
        assert bundle.merge(empty, tmp_path / "b").added == {}
        kept = sql(empty.database.path, "SELECT DISTINCT domain FROM prompts")
        assert ("/r/python" in change) == (kept == [("/r/python",)])

    def test_domains_that_end_alike_stay_apart(self, empty: EvidenceStore, tmp_path: Path) -> None:
        """`/r/python` and `/x/python` are two choices of one policy."""
        policy = made.policy(*(made.choice(domain=name) for name in ("mixed", "/r/python", "/x/python")))
        save_policy(empty, policies.to_json(policy), policy.target, policy.environment)
        assert bundle.pack(empty, tmp_path / "b").rows["policies"] == 1

    @pytest.mark.parametrize(
        "options",
        [
            'PYTHONPATH=/opt/a:/opt/b/lib /opt/vllm/bin/python -m vllm --port {port} --c "/srv/a b/c.yaml"',
            json.dumps({"served by": "python -m vllm --config /srv/planted.yaml"}),
            "HF_TOKEN=hf_planted12345 vllm serve --api-key sk-planted12345",
        ],
    )
    def test_no_secret_or_path_travels(self, empty: EvidenceStore, tmp_path: Path, options: str) -> None:
        """A machine that 0.5 stored with one stays home with what it measured; a reason loses its secrets."""
        server = replace(MACHINE, engine_options=options)
        save_sample(empty, 0)
        save_sample(empty, 0, server)
        policy = replace(made.policy(), environment=server)
        save_policy(empty, policies.to_json(policy), policy.target, server)
        detail = "http://user:planted-pw@host/v1 refused --api-key sk-planted12345"
        setup = Setup(draft=DRAFT_A, length=64)
        empty.save_infeasible(SCOPE, Infeasible(setup=setup, reason="EngineError", detail=detail))
        contents = bundle.pack(empty, tmp_path / "b")
        assert contents.left_out == {"environments": 1, "units": 1, "policies": 1}
        assert (contents.rows["infeasible"], contents.rows["units"]) == (1, 1)
        data = (tmp_path / "b").read_bytes()
        assert not [part for part in (b"/opt", b"/srv", b"planted") if part in data]

    def test_a_damaged_row_is_left_out(self, packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
        """With the acceptance over a trace that is no trace any more."""
        num_units = bundle.merge(empty, packed).added["units"]
        sql(empty.database.path, "UPDATE samples SET output_tokens = 0 WHERE unit_id = 1")
        sql(empty.database.path, "UPDATE target_traces SET token_ids = 'x' WHERE id = 1")
        contents = bundle.pack(empty, tmp_path / "b")
        assert contents.left_out == {"units": 1, "target_traces": 1, "acceptance_traces": 1}
        assert contents.rows["units"] == num_units - 1


class TestConflicts:
    def test_another_value_is_reported(self, tmp_path: Path, empty: EvidenceStore) -> None:
        """The key and both values; the store's own stays and the rest is merged."""
        with EvidenceStore.open(tmp_path / "theirs.db") as evidence_store:
            fill(evidence_store)
            save_sample(evidence_store, 1)
            num_units = bundle.pack(evidence_store, tmp_path / "theirs").rows["units"]
        save_sample(empty, 0)
        [(ours,)] = sql(empty.database.path, "SELECT ttft_s FROM samples")
        merged = bundle.merge(empty, tmp_path / "theirs")
        assert merged.unlike == {"units": 1}
        assert merged.added["units"] == num_units - 1
        [conflict] = merged.conflicts
        assert conflict.startswith("units digest ")
        assert f"{ours} in the store" in conflict or "in the bundle" in conflict
        assert sql(empty.database.path, "SELECT ttft_s FROM samples WHERE unit_id = 1") == [(ours,)]

    @pytest.mark.parametrize(
        ("table", "change"),
        [
            ("models", "UPDATE models SET num_params = num_params + 1"),
            ("sweeps", "UPDATE step_times SET disturbed = 1"),
            ("sweeps", "DELETE FROM step_times WHERE width = 1"),
            ("target_traces", "UPDATE target_traces SET ended = 1 - ended WHERE id = 1"),
            ("units", "UPDATE samples SET output_tokens = output_tokens + 1 WHERE unit_id = 1"),
        ],
    )
    def test_every_table_is_compared(
        self, table: str, change: str, packed: Path, empty: EvidenceStore, tmp_path: Path
    ) -> None:
        """What differs is counted and the store stays as it was."""
        bundle.merge(empty, packed)
        before = content(empty.database.path.parent)
        merged = bundle.merge(empty, resealed(packed, tmp_path / "changed", change))
        assert (merged.added, merged.unlike[table]) == ({}, 1)
        assert content(empty.database.path.parent) == before

    def test_rounded_figures_are_alike(self, empty: EvidenceStore, tmp_path: Path) -> None:
        """Another device's probabilities of the same tokens differ in their last digits."""
        [prompt] = prompts(1)
        trace = FakeEngine().trace_target(GREEDY, prompt)
        with EvidenceStore.open(tmp_path / "other.db") as other:
            rounded = tuple(abs(value - 4e-4) for value in trace.target_probs)
            other.save_target_trace(SCOPE, prompt, replace(trace, target_probs=rounded))
            bundle.pack(other, tmp_path / "b")
        empty.save_target_trace(SCOPE, prompt, trace)
        merged = bundle.merge(empty, tmp_path / "b")
        assert (merged.unlike, merged.stored["target_traces"]) == ({}, 1)

    def test_acceptance_over_other_tokens_is_not_merged(self, empty: EvidenceStore, tmp_path: Path) -> None:
        """Where the store's target emitted other tokens, the bundle's acceptance is of a text that is not there."""
        [prompt], fake = prompts(1), FakeEngine()
        trace = fake.trace_target(GREEDY, prompt)
        with EvidenceStore.open(tmp_path / "other.db") as other:
            other.save_target_trace(SCOPE, prompt, trace)
            other.save_acceptance(SCOPE, prompt, DRAFT_A, fake.trace_draft(GREEDY, prompt, trace, DRAFT_A, 4))
            bundle.pack(other, tmp_path / "b")
        empty.save_target_trace(SCOPE, prompt, replace(trace, token_ids=(*trace.token_ids[:-1], 1)))
        assert bundle.merge(empty, tmp_path / "b").unlike == {"target_traces": 1, "acceptance_traces": 1}

    def test_an_older_policy_is_kept_beside(self, packed: Path, empty: EvidenceStore) -> None:
        """The store's policy of another target stays, and so does the generation of the merged one."""
        newer = made.policy()
        save_policy(empty, policies.to_json(newer), newer.target, newer.environment)
        bundle.merge(empty, packed)
        assert sql(empty.database.path, "SELECT count(*), max(generation) FROM policies") == [(2, 1)]


class TestCommands:
    def said(self, store: Path, *words: str | Path) -> Said:
        return call(store, "bundle", *words)

    def test_from_one_store_to_another(self, store: Path, packed: Path, tmp_path: Path) -> None:
        """Pack, inspect and merge say what they did; their last line is JSON when asked."""
        said = self.said(store, "pack", tmp_path / "b", "--json")
        assert (said.code, said.stderr) == (0, "")
        assert said.document["rows"]["policies"] == 1
        assert (tmp_path / "b").read_bytes() == packed.read_bytes()
        said = self.said(tmp_path, "inspect", tmp_path / "b")
        assert "target imported:fake-target, float32, digest e99e3920" in said.stdout
        assert "draft draft-a\n" in said.stdout
        assert self.said(tmp_path, "inspect", tmp_path / "b", "--json").document["sha256"] in said.stdout
        new = tmp_path / "new store"
        assert "policies: 1 new, 0 known" in self.said(new, "merge", tmp_path / "b").stdout
        assert self.said(new, "merge", tmp_path / "b", "--json").document["added"] == {}
        assert call(new, "lookup").stdout == call(store, "lookup").stdout.replace(A_PATH, "imported:fake-target")
        assert call(new, "show").code == 0
        assert call(new, "explain").code == 0

    def test_what_is_refused(self, store: Path, packed: Path, tmp_path: Path) -> None:
        """One line and the documented code; a refused merge makes no store."""
        bad = tmp_path / "bad"
        bad.write_bytes(packed.read_bytes()[:-7])
        before = content(store)
        assert_refused(self.said(store, "merge", bad), 2, "damaged")
        assert_refused(self.said(store, "inspect", bad), 2, "damaged")
        assert_refused(self.said(tmp_path / "new", "merge", bad), 2, "damaged")
        assert not (tmp_path / "new").exists()
        assert_refused(self.said(tmp_path / "new", "pack", tmp_path / "b"), 3, "no store in")
        assert_refused(self.said(store, "pack", tmp_path / "b", "--target", "nosuch"), 3, "'nosuch'")
        assert_refused(self.said(store, "pack", tmp_path / "no" / "b"), 2, "cannot be written: No such file")
        assert_refused(self.said(store, "pack"), 2, "OUT")
        for folder in ("", tmp_path):
            assert_refused(self.said(store, "pack", folder), 2, "cannot be written: Is a directory")
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/zero"):
            assert_refused(self.said(store, "inspect", path), 2, "cannot be read: Not a regular file")
            assert_refused(self.said(store, "merge", path), 2, "cannot be read: Not a regular file")
        assert_refused(self.said(store, "merge", tmp_path / "missing"), 2, "No such file")
        assert content(store) == before


def test_units_of_several_setups_and_prompts(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """Plain against plain, and a prompt that is run twice, included."""
    fake, (one, two) = FakeEngine(), prompts(2)
    a4 = Setup(draft=NGRAM, length=4)
    runs = [((one, two), (PLAIN, a4)), ((one,), (PLAIN, PLAIN)), ((one, one), (a4,)), ((two, one), (PLAIN, PLAIN))]
    for number, (queue, setups) in enumerate(runs):
        samples = fake.run_together(GREEDY, queue, setups, f"race {number}")
        evidence_store.save_samples(SCOPE, queue, setups, f"race {number}", samples)
    assert bundle.pack(evidence_store, tmp_path / "b").rows["samples"] == 12


def test_times_in_the_future_are_clamped(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """Of a bundle whose clock ran ahead, so that its evidence grows old."""
    save_sample(evidence_store, 0)
    bundle.pack(evidence_store, tmp_path / "b")
    later = update("units", "measured_at", "2999-01-01T00:00:00.000000+00:00")
    with EvidenceStore.open(tmp_path / "other.db") as other:
        assert bundle.merge(other, resealed(tmp_path / "b", tmp_path / "c", later)).clamped == 1


def test_a_merge_holds_the_lock_for_a_few_items(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer gets its turn between two transactions."""
    assert bundle.BATCH <= 100
    monkeypatch.setattr(bundle, "BATCH", 10)
    with EvidenceStore.open(tmp_path / "here.db") as evidence_store:
        writing, sizes = evidence_store.writing, []

        def counted() -> Any:
            sizes.append(sql(evidence_store.database.path, "SELECT count(*) FROM units"))
            return writing()

        evidence_store.writing = counted  # type: ignore[method-assign]
        bundle.merge(evidence_store, packed)
    assert len(sizes) >= 2
