"""What `show` tells: how much of what the store holds, how old it is, and from which machine."""

import io
from dataclasses import replace

from rich.console import Console

from profiles.records.core import PLAIN, Draft, Setup
from profiles.records.evidence import Infeasible
from store.evidence_store import EvidenceStore, Scope
from store.inventory import Failure, inventory
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts
from tests.support.policies import save_policy
from tests.support.servers import ask
from tuner.cli.show import inventory_table

FIRST, SECOND = prompts(2)
A4 = Setup(draft=DRAFT_A, length=4)
HERE = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
LATER_TORCH = replace(HERE, environment=replace(MACHINE, torch="2.14.0"))
HALF = replace(HERE, target=replace(TARGET, dtype="bfloat16"))


def fill(evidence_store: EvidenceStore) -> None:
    """Two runs of which one is disturbed, a trace and a policy here; a policy under a later torch, one in bfloat16."""
    quiet, busy = FakeEngine(), FakeEngine()
    busy.disturbed = True
    evidence_store.save_target_trace(HERE, FIRST, quiet.trace_target(GREEDY, FIRST))
    for prompt, fake in ((FIRST, quiet), (SECOND, busy)):
        unit = ((prompt,), (PLAIN,), "race 0")
        evidence_store.save_samples(HERE, *unit, fake.run_together(GREEDY, *unit))
    for scope in (HERE, LATER_TORCH, HALF):
        save_policy(evidence_store, "{}", scope.target, scope.environment)


def made_at(evidence_store: EvidenceStore, table: str, time: str, machine: str | None = None) -> None:
    """Writes a row's time into the file, of every machine or of one."""
    column = "created_at" if table == "policies" else "measured_at"
    where = f" WHERE environment_digest = '{machine}'" if machine else ""
    ask(evidence_store, f"UPDATE {table} SET {column} = '{time}'{where}")


def shown(evidence_store: EvidenceStore, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(inventory_table(inventory(evidence_store)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_an_empty_store_knows_nothing(evidence_store: EvidenceStore) -> None:
    """No row, no entry."""
    assert inventory(evidence_store) == ()


def test_one_entry_per_target_float_type_and_software(evidence_store: EvidenceStore) -> None:
    """Rows are counted apart for another torch and another float type; tables without a row are left out."""
    fill(evidence_store)
    found = {(entry.target.dtype, entry.environment.torch): entry for entry in inventory(evidence_store)}
    assert {key: (entry.rows, entry.disturbed) for key, entry in found.items()} == {
        ("float32", "2.13.0"): ({"target_traces": 1, "samples": 2, "policies": 1}, 0.5),
        ("float32", "2.14.0"): ({"policies": 1}, None),
        ("bfloat16", "2.13.0"): ({"policies": 1}, None),
    }
    assert found["float32", "2.14.0"].target == TARGET
    assert found["float32", "2.14.0"].environment == LATER_TORCH.environment


def test_the_oldest_and_the_newest_row_give_the_age(evidence_store: EvidenceStore) -> None:
    """Over all tables of an entry; the entry with the newest row comes first."""
    fill(evidence_store)
    here, later = MACHINE.digest, LATER_TORCH.environment.digest
    made_at(evidence_store, "policies", "2026-11-20T00:00:00.000000+00:00")
    made_at(evidence_store, "policies", "2026-11-22T00:00:00.000000+00:00", later)
    made_at(evidence_store, "target_traces", "2026-11-01T00:00:00.000000+00:00", here)
    made_at(evidence_store, "units", "2026-11-21T00:00:00.000000+00:00", here)
    assert [
        (entry.environment.digest == later, entry.oldest[:10], entry.newest[:10]) for entry in inventory(evidence_store)
    ] == [(True, "2026-11-22", "2026-11-22"), (False, "2026-11-01", "2026-11-21"), (False, "2026-11-20", "2026-11-20")]


def test_the_latest_different_failures_are_told(evidence_store: EvidenceStore) -> None:
    """Three at most, newest first; the same setup failing for the same reason counts once."""
    early_exit = Draft(kind="early_exit", num_layers=2)
    a3 = Setup(draft=DRAFT_A, length=3, stop_below=0.25)
    for setup in (Setup(draft=early_exit, length=1), Setup(draft=NGRAM, length=2), a3, A4, A4):
        failed = Infeasible(setup=setup, reason="OutOfMemoryError", detail="3 GiB were asked for")
        evidence_store.save_infeasible(HERE, failed)
    made_at(evidence_store, "infeasible", "2026-11-22T09:00:00.000000+00:00")
    (entry,) = inventory(evidence_store)
    assert entry.rows == {"infeasible": 5}
    names = [failure.setup_name for failure in entry.failures]
    assert names == ["draft-a k=4", "draft-a k=3 stop<0.25", "ngram:max=4,min=2 k=2"]
    latest = Failure(
        setup_name=names[0], reason=failed.reason, detail=failed.detail, seen="2026-11-22T09:00:00.000000+00:00"
    )
    assert entry.failures[0] == latest
    (line,) = [line for line in shown(evidence_store, 200).splitlines() if "draft-a k=4" in line]
    assert line.strip().split("  ")[0] == "draft-a k=4 failed: OutOfMemoryError, 3 GiB were asked for"
    assert line.strip().endswith("2026-11-22 09:00")


def test_the_table_says_whose_where_how_much_and_how_old(evidence_store: EvidenceStore) -> None:
    """Every line fits 80 columns."""
    fill(evidence_store)
    for table in ("target_traces", "units", "policies"):
        made_at(evidence_store, table, "2026-11-19T11:00:00.000000+00:00")
    text = shown(evidence_store, 80)
    assert max(map(len, text.splitlines())) <= 80
    said = (f"float32, digest {TARGET.digest[:8]}", "fake cpu, 2 threads", "torch 2.14.0", "target traces: 1")
    said += (
        "samples: 2",
        "policies: 1",
        "50.0% of samples disturbed",
        "newest: 2026-11-19 11:00",
        "oldest: 2026-11-19 11:00",
    )
    assert [line for line in said if line not in text] == []
