"""A store of schema 0004, with a whole tuning run in it, keeps its rows and its answers when it is upgraded.

`store-0004-lookups.json` holds what version 0.5.0 answered from that file.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sqlalchemy import text

from profiles.hardware.device import drop_unknown
from profiles.records.core import PLAIN, Setup
from store import migrations
from store.database import connect
from store.evidence_store import EvidenceStore, Scope
from tests import ROOT
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts, sql
from tuner.deploy.lookup import Query, lookup

ASSETS = ROOT / "tests" / "assets"
TUNED = replace(MACHINE, device="tuned cpu")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.sqlite"
    shutil.copy(ASSETS / "store-0004.sqlite", path)
    return path


@pytest.fixture
def upgraded(old: Path, tmp_path: Path) -> Path:
    path = tmp_path / "upgraded.sqlite"
    shutil.copy(old, path)
    EvidenceStore.open(path).close()
    return path


def test_look_ups_answer_as_before(upgraded: Path) -> None:
    """Setup, proof, match and reason of every question are those of the version that wrote the store."""
    with EvidenceStore.open_read_only(upgraded) as evidence_store:
        for wanted in json.loads((ASSETS / "store-0004-lookups.json").read_text()):
            names = ("batch_size", "domain")
            query = Query(target="fake-target", temperature=0.0, **{name: wanted[name] for name in names})
            found = lookup(evidence_store, query, drop_unknown(asdict(TUNED)))
            choice = found.answer.choice
            answer = {
                "setup": choice.setup.name,
                "proven": choice.proven,
                "level": found.level,
                "matched": found.answer.matched,
                "speedup": choice.measured.speedup.estimate if choice.measured else None,
            }
            assert answer == {name: wanted[name] for name in answer}, wanted


def test_no_timed_run_is_lost(old: Path, upgraded: Path) -> None:
    """Every sample is under the digest of its unit, with setup, prompt and seconds as they were."""
    before = sql(
        old,
        "SELECT unit, position, occasion, setup_digest, setup_name, prompt_digest, ttft_s, decode_s, output_tokens, "
        "rounds, shapes, output_digest FROM samples ORDER BY unit, position",
    )
    after = sql(
        upgraded,
        "SELECT units.digest, position, purpose, setups.digest, setups.name, prompts.digest, ttft_s, decode_s, "
        "output_tokens, rounds, shapes, output_digest FROM samples JOIN units ON units.id = unit_id "
        "JOIN setups ON setups.id = setup_id JOIN prompts ON prompts.id = prompt_id ORDER BY units.digest, position",
    )
    assert after == before
    assert len(after) > 100
    for table in ("target_traces", "acceptance_traces", "lookup_traces", "runs", "policies", "infeasible"):
        count = f"SELECT count(*) FROM {table}"
        assert sql(upgraded, count) == sql(old, count)
    sweeps = "SELECT count(DISTINCT sweep) FROM step_times"
    assert sql(upgraded, "SELECT count(*) FROM sweeps") == sql(old, sweeps)


def test_old_rows_have_columns_for_people(upgraded: Path) -> None:
    """Batch size, temperature, draft and k are known again; a prompt's domain is not."""
    query = "SELECT DISTINCT batch_size, temperature FROM timed_runs WHERE device = 'tuned cpu' ORDER BY 1"
    assert sql(upgraded, query) == [(1, 0.0), (8, 0.0)]
    setups = sql(upgraded, "SELECT DISTINCT draft, draft_kind, k FROM timed_runs ORDER BY k")
    assert setups == [(None, None, 0), ("draft-a", "model", 2), ("draft-a", "model", 4)]
    assert sql(upgraded, "SELECT DISTINCT domain FROM timed_runs") == [(None,)]
    query = "SELECT draft, k, round(speedup, 2), proven FROM best WHERE domain = 'sql' AND batch_size = 1"
    assert sql(upgraded, query) == [("draft-a", 2, 2.03, 1)]
    assert sql(upgraded, "SELECT batch_size, setup, reason FROM failures") == [(8, "draft-a k=4", "OutOfMemoryError")]
    [(measured_units, grid_seconds)] = sql(upgraded, "SELECT measured_units, grid_seconds_estimate FROM run_costs")
    assert measured_units > 100
    assert grid_seconds > 1.0
    assert sql(upgraded, "SELECT count(*) FROM acceptance WHERE accept_rate BETWEEN 0 AND 1") != [(0,)]
    assert sql(upgraded, "SELECT count(*) FROM step_ms WHERE component = 'target' AND width = 3") != [(0,)]


def test_a_domain_is_filled_in_when_its_prompts_are_run_again(upgraded: Path) -> None:
    """A run notes the domains of its prompts at its start, also of those that it only recalls."""
    scope = Scope(target=TARGET, environment=TUNED, workload=GREEDY)
    with EvidenceStore.open(upgraded) as evidence_store:
        evidence_store.save_run(scope, prompts(24, "sql"))
    assert sql(upgraded, "SELECT DISTINCT domain, count(*) > 0 FROM timed_runs GROUP BY 1") == [(None, 1), ("sql", 1)]


def test_revision_0005_is_as_it_was_released(old: Path) -> None:
    """Its rows do not change with later tables, records and digests."""
    with connect(old, 1.0).transaction("write") as connection:
        migrations.upgrade(connection, "0005")
        names = connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")).all()
        rows = {name: connection.execute(text(f"SELECT * FROM {name}")).all() for name in names}
    assert [len(rows[name]) for name in ("units", "samples", "choices")] == [54, 168, 6]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "ce1afb9d73a161d4"


def test_a_damaged_row_is_left_out(old: Path) -> None:
    """It could not be read before either; the rest of the store is upgraded."""
    sql(old, "UPDATE target_traces SET token_ids = '[1, 2' WHERE id = 1")
    sql(old, "UPDATE target_traces SET logit_gaps = replace(logit_gaps, '[', '[NaN, ') WHERE id = 2")
    [(before,)] = sql(old, "SELECT count(*) FROM target_traces")
    with EvidenceStore.open(old) as evidence_store:
        scope = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
        [prompt] = prompts(1)
        assert evidence_store.find_samples(scope, (prompt,), (PLAIN, Setup(draft=DRAFT_A, length=4)), "proof 0")
    assert sql(old, "SELECT count(*) FROM target_traces") == [(before - 2,)]


def test_step_times_of_schema_0005_are_greedy(tmp_path: Path) -> None:
    """They answer for greedy workloads as before, and for none that samples."""
    path = tmp_path / "store.sqlite"
    shutil.copy(ASSETS / "store-0005.sqlite", path)
    with EvidenceStore.open(path) as evidence_store:
        scopes = [
            Scope(target=TARGET, environment=MACHINE, workload=replace(GREEDY, temperature=temperature))
            for temperature in (0.0, 0.8)
        ]
        greedy, sampled = (
            evidence_store.find_step_times(scope, (DRAFT_A, NGRAM), context_length=96, max_length=4) for scope in scopes
        )
    assert greedy == FakeEngine().time_steps(GREEDY, 96, 4)
    assert sampled is None
    assert sql(path, "SELECT DISTINCT sampling FROM step_ms") == [(None,)]


def test_a_run_that_never_ended_has_no_outcome(old: Path) -> None:
    sql(old, "UPDATE runs SET finished_at = NULL, outcome = NULL")
    EvidenceStore.open(old).close()
    assert {kind for (kind,) in sql(old, "SELECT typeof(outcome) FROM runs")} == {"null"}
