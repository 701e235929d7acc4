"""A bundle carries a store whole, twice changes nothing, and never replaces what was measured."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import NotMeasuredError, StoreError
from store import migrations
from store.bundle import bundle
from store.bundle import rows as bundle_rows
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.support import policies as made
from tests.support.bundles import ELSEWHERE, SCOPE, Rows, fill, named, opened, refused, resealed, row_of, save_sample
from tests.support.cli import Said, assert_refused, call, content
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts, sql
from tests.support.policies import save_policy
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
def verbs() -> None:
    """`tune.py bundle`, whether or not the command line has it already."""


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
        assert merged.known == {}
        for table, count in merged.added.items():
            assert sql(empty.path, f"SELECT count(*) FROM {table}") == [(count,)]
            assert sql(store / "evidence.db", f"SELECT count(*) FROM {table}") == [(count,)]
        assert set(merged.added) == set(bundle_rows.TABLES) - {"lookup_traces"}
        bundle.pack(empty, tmp_path / "again.bundle")
        assert (tmp_path / "again.bundle").read_bytes() == packed.read_bytes()

    def test_the_evidence_answers(self, packed: Path, empty: EvidenceStore) -> None:
        """Traces, timings, the policy and the run's outcome are found as if they had been measured here."""
        bundle.merge(empty, packed)
        fake, prompt = FakeEngine(keep=0.95), prompts(30)[0]
        rows = sql(empty.path, "SELECT DISTINCT context_length, max_length FROM step_times")
        assert empty.find_step_times(SCOPE, (DRAFT_A,), rows[0]) is not None
        traced = {digest for (digest,) in sql(empty.path, "SELECT prompt_digest FROM target_traces")}
        prompt = next(one for one in prompts(30) if one.digest in traced)
        assert empty.find_target_trace(SCOPE, prompt) == fake.trace_target(GREEDY, prompt)
        assert empty.find_acceptance(SCOPE, prompt, DRAFT_A, 2) == fake.trace_draft(
            GREEDY, prompt, fake.trace_target(GREEDY, prompt), DRAFT_A, 2
        )
        text = empty.latest_policy("imported:fake-target", MACHINE)
        assert text is not None
        assert policies.from_json(text).headline.proven
        assert empty.latest_outcome(TARGET, MACHINE)["cost"]["measured_units"] > 0

    def test_units_keep_their_order(self, packed: Path, empty: EvidenceStore) -> None:
        """Runs of a unit come back by position, whatever number their rows get."""
        bundle.merge(empty, packed)
        for unit, positions in sql(
            empty.path, "SELECT unit, group_concat(position) FROM (SELECT * FROM samples ORDER BY id) GROUP BY unit"
        ):
            assert positions == ",".join(map(str, range(positions.count(",") + 1))), unit

    def test_a_second_merge_changes_nothing(self, packed: Path, store: Path, tmp_path: Path) -> None:
        """Neither where it was merged before nor where it comes from, although names are other ones there."""
        shutil.copytree(store, tmp_path / "copy")
        before = content(tmp_path / "copy")
        with EvidenceStore.open(tmp_path / "copy" / "evidence.db") as evidence_store:
            assert bundle.merge(evidence_store, packed).added == {}
        assert content(tmp_path / "copy") == before

    def test_two_machines_in_either_order(self, packed: Path, tmp_path: Path) -> None:
        """What two machines measured is the same store content whichever bundle comes first."""
        with EvidenceStore.open(tmp_path / "other.db") as evidence_store:
            fill(evidence_store, ELSEWHERE)
            save_sample(evidence_store, 3, ELSEWHERE)
            bundle.pack(evidence_store, tmp_path / "two.bundle")
        held = []
        for order in ((packed, tmp_path / "two.bundle"), (tmp_path / "two.bundle", packed)):
            with EvidenceStore.open(tmp_path / f"{order[0].stem} first.db") as evidence_store:
                for path in order:
                    bundle.merge(evidence_store, path)
                bundle.pack(evidence_store, tmp_path / "both.bundle")
                _, rows = opened(tmp_path / "both.bundle")
            for table, row in rows:  # what depends on it: which machine traced a prompt first, and a model's name
                if table.endswith("_traces"):
                    del row["environment_digest"], row["measured_at"]
                if table == "models":
                    del row["name"]
            held.append(sorted(map(json.dumps, rows)))
        assert held[0] == held[1]
        assert sql(tmp_path / "one first.db", "SELECT count(DISTINCT environment_digest) FROM policies") == [(2,)]

    def test_a_part_can_be_packed(self, tmp_path: Path, empty: EvidenceStore) -> None:
        """By target and by machine; traces are true everywhere and come along."""
        with EvidenceStore.open(tmp_path / "some.db") as evidence_store:
            fill(evidence_store)
            save_sample(evidence_store, 0, ELSEWHERE)
            contents = bundle.pack(evidence_store, tmp_path / "a", targets=["fake-target"], environments=["other cpu"])
            assert contents.rows["samples"] == 1
            assert contents.rows["target_traces"] > 0
            assert "policies" not in contents.rows
            assert {one.device for one in contents.environments} == {"fake cpu", "other cpu"}
            with pytest.raises(NotMeasuredError, match="knows nothing of 'nosuch'"):
                bundle.pack(evidence_store, tmp_path / "b", targets=["nosuch"])
        with pytest.raises(NotMeasuredError, match="has nothing to pack"):
            bundle.pack(empty, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_runs_that_never_ended_stay(self, tmp_path: Path, packed: Path) -> None:
        """A run that is under way or was killed is not packed."""
        with EvidenceStore.open(tmp_path / "store.db") as evidence_store:
            bundle.merge(evidence_store, packed)
            evidence_store.save_run(SCOPE)
            assert bundle.pack(evidence_store, tmp_path / "b").rows["runs"] == 1

    def test_an_older_schema_is_filled(self, tmp_path: Path, packed: Path, empty: EvidenceStore) -> None:
        """A bundle of schema 0001 lacks columns that have defaults now; a store of that schema packs."""

        def older(header: dict[str, Any], rows: Rows) -> None:
            header["schema"] = "0001"
            for table, row in rows:
                if table == "environments":
                    del row["compute_capability"], row["memory_bandwidth_bytes_s"]
                if table == "samples":
                    del row["shapes"], row["refills"]

        bundle.merge(empty, resealed(packed, tmp_path / "old", older))
        assert sql(empty.path, "SELECT DISTINCT shapes, refills FROM samples") == [("[]", 0)]
        shutil.copy(RELEASED_0001, tmp_path / "old.sqlite")
        sql(tmp_path / "old.sqlite", "DELETE FROM policies")  # its policy was made up
        with EvidenceStore.open(tmp_path / "old.sqlite") as evidence_store:
            assert bundle.pack(evidence_store, tmp_path / "0001").schema == migrations.HEAD
            assert bundle.merge(evidence_store, tmp_path / "0001").added == {}

    def test_no_path_leaves_the_machine(self, store: Path, packed: Path) -> None:
        """Of a model that was named by a path, the last part is told, marked as such; the store keeps the name."""
        text = gzip.decompress(packed.read_bytes().split(b"\n", 1)[1]).decode()
        assert "someone" in "".join(content(store))
        assert "someone" not in text
        assert '"name":"imported:fake-target"' in text
        assert '"name":"fake-target"' not in text


class TestUnlikeEvidence:
    def test_another_value_is_refused(self, tmp_path: Path, empty: EvidenceStore) -> None:
        """The key and both values are named, and nothing of the bundle is added."""
        with EvidenceStore.open(tmp_path / "theirs.db") as evidence_store:
            fill(evidence_store)
            save_sample(evidence_store, 1)
            bundle.pack(evidence_store, tmp_path / "theirs")
        save_sample(empty, 0)
        [(ours,)] = sql(empty.path, "SELECT ttft_s FROM samples")
        query = "SELECT ttft_s, unit FROM samples ORDER BY id DESC LIMIT 1"
        [(theirs, unit)] = sql(tmp_path / "theirs.db", query)
        said = refused(empty, tmp_path / "theirs")
        assert f"unlike evidence in samples under unit {unit}" in said
        assert f"ttft_s is {ours} in the store, {theirs} in the bundle" in said

    @pytest.mark.parametrize(
        ("table", "column", "place"),
        [
            ("target_traces", "token_ids", "token_ids[3] is "),
            ("acceptance_traces", "keep_probs", "accept_probs[3] is "),
            ("step_times", "samples_s", "samples_s[1][1][3] is "),
            ("models", "num_params", "num_params is "),
        ],
    )
    def test_every_table_is_guarded(
        self, table: str, column: str, place: str, packed: Path, empty: EvidenceStore, tmp_path: Path
    ) -> None:
        """The first place that differs is told."""

        def change(_: dict[str, Any], rows: Rows) -> None:
            row = row_of(rows, table)
            if table == "models":
                row[column] += 1
                return
            values = row[column] if table != "step_times" else row[column][1][1]
            values[3] = 1 - values[3] if table == "acceptance_traces" else values[3] * 2

        bundle.merge(empty, packed)
        said = refused(empty, resealed(packed, tmp_path / "changed", change))
        assert f"unlike evidence in {table} under " in said
        assert place in said
        assert " in the store, " in said

    def test_figures_that_were_rounded_otherwise_are_alike(
        self, packed: Path, empty: EvidenceStore, tmp_path: Path
    ) -> None:
        """Another device's probabilities of the same tokens differ in their last digits: the store's stay."""

        def change(_: dict[str, Any], rows: Rows) -> None:
            probs = row_of(rows, "target_traces")["target_probs"]
            probs[3] = round(probs[3] - 4e-4, 9)

        bundle.merge(empty, packed)
        before = content(empty.path.parent)
        assert bundle.merge(empty, resealed(packed, tmp_path / "c", change)).added == {}
        assert content(empty.path.parent) == before

    def test_the_stores_own_may_be_kept(self, packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
        """What contradicts the store is left out with the acceptance over it, and the rest is merged."""
        given: dict[str, int] = {}

        def change(_: dict[str, Any], rows: Rows) -> None:
            trace = row_of(rows, "target_traces")
            trace["token_ids"][3] += 1
            given["over"] = sum(
                name in ("acceptance_traces", "lookup_traces") and row["prompt_digest"] == trace["prompt_digest"]
                for name, row in rows
            )

        other = resealed(packed, tmp_path / "c", change)
        with EvidenceStore.open(tmp_path / "only_traces.db") as evidence_store:
            bundle.merge(evidence_store, packed)
            sql(evidence_store.path, "DELETE FROM acceptance_traces")
            sql(evidence_store.path, "DELETE FROM lookup_traces")
            refused(evidence_store, other)
            merged = bundle.merge(evidence_store, other, keep_mine=True)
        assert merged.unlike["target_traces"] == 1
        assert sum(merged.unlike.values()) == 1 + given["over"]
        assert given["over"] > 0

    def test_a_longer_unit_is_unlike(self, packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
        """A sweep of which a part is missing is not the same sweep."""

        def change(_: dict[str, Any], rows: Rows) -> None:
            rows.remove(["step_times", row_of(rows, "step_times")])

        bundle.merge(empty, packed)
        assert "3 rows in the store, 2 in the bundle" in refused(empty, resealed(packed, tmp_path / "c", change))

    def test_an_older_policy_is_kept_beside(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """Merged rows keep their time, by which a later look-up can tell the newest."""
        newer = made.policy()
        save_policy(empty, policies.to_json(newer), newer.target, newer.environment)
        bundle.merge(empty, packed)
        assert sql(empty.path, "SELECT id FROM policies ORDER BY created_at, id") == [(2,), (1,)]


@pytest.mark.usefixtures("verbs")
class TestVerbs:
    def said(self, store: Path, *words: str | Path) -> Said:
        return call(store, "bundle", *words)

    def test_from_one_store_to_another(self, store: Path, packed: Path, tmp_path: Path) -> None:
        """Pack, inspect and merge say what they did; their last line is JSON when asked."""
        said = self.said(store, "pack", tmp_path / "b", "--policies", tmp_path / "out", "--json")
        assert (said.code, said.stderr) == (0, "")
        assert said.document["rows"]["policies"] == 1
        assert [Path(path).exists() for path in said.document["policy_paths"]] == [True]
        assert (tmp_path / "b").read_bytes() == packed.read_bytes()
        said = self.said(tmp_path, "inspect", tmp_path / "b")
        assert "target imported:fake-target, float32, digest e99e3920" in said.stdout
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


def test_a_damaged_store_is_not_packed(packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
    """A row that no record allows is named instead of being carried on."""
    bundle.merge(empty, packed)
    sql(empty.path, "UPDATE samples SET output_tokens = 0 WHERE id = 1")
    with pytest.raises(StoreError, match="samples: a run emitted 0 tokens"):
        bundle.pack(empty, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_units_of_several_setups_and_prompts(evidence_store: EvidenceStore, tmp_path: Path) -> None:
    """A unit's digest is recomputed from its rows, plain against plain and a prompt asked twice included."""
    fake, (one, two) = FakeEngine(), prompts(2)
    a4 = Setup(draft=NGRAM, length=4)
    asked = [((one, two), (PLAIN, a4)), ((one,), (PLAIN, PLAIN)), ((one, one), (a4,)), ((two, one), (PLAIN, PLAIN))]
    for number, (queue, setups) in enumerate(asked):
        runs = fake.run_together(GREEDY, queue, setups, f"race {number}")
        evidence_store.save_samples(SCOPE, queue, setups, f"race {number}", runs)
    assert bundle.pack(evidence_store, tmp_path / "b").rows["samples"] == 12
