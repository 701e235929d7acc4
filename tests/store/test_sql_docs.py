"""The questions of docs/sql.md are answered by the store of a run, each by one simple SELECT."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import Setup
from profiles.records.evidence import Infeasible
from store.evidence_store import EvidenceStore, Scope
from tests import ROOT
from tests.support.fakes import DRAFT_A, GREEDY, FakeEngine, prompts, sql
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession, tune

QUERIES = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "sql.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two domains at batch sizes 1 and 8, and a failure."""
    path = tmp_path_factory.mktemp("sql") / "evidence.db"
    engine = FakeEngine(keep_by_domain={"code": 0.95, "prose": 0.2})
    workload = replace(GREEDY, max_new_tokens=12, context_length=64)
    chosen = (*prompts(24, "code"), *prompts(24, "prose"))
    loads = [(replace(workload, batch_size=size), chosen) for size in (1, 8)]
    with EvidenceStore.open(path) as evidence_store:
        tune(engine, loads, TuningSession.of(evidence_store), Options(lengths=(1, 2)), Watch())
        scope = Scope(target=engine.target, environment=engine.environment, workload=loads[1][0])
        failed = Infeasible(setup=Setup(draft=DRAFT_A, length=2), reason="OutOfMemoryError", detail="3 GiB")
        evidence_store.save_infeasible(scope, failed)
    return path


def test_there_are_ten_questions() -> None:
    """Each is one SELECT without a subquery or a join."""
    assert len(QUERIES) == 10
    for query in QUERIES:
        assert len(re.findall(r"\bSELECT\b", query)) == 1, query
        assert "JOIN" not in query


@pytest.mark.parametrize("query", QUERIES)
def test_a_question_is_answered(query: str, store: Path) -> None:
    """By at least one row without an unknown figure."""
    rows = sql(store, query)
    assert rows, query


def test_the_answers_are_those_of_the_run(store: Path) -> None:
    """Domains, batch sizes, drafts and lengths are those that were run; the best draft is the policy's."""
    assert sql(store, "SELECT DISTINCT domain, batch_size FROM timed_runs ORDER BY 1, 2") == [
        ("code", 1),
        ("code", 8),
        ("prose", 1),
        ("prose", 8),
    ]
    [(draft, k, speedup, proven)] = sql(
        store, "SELECT draft, k, speedup, proven FROM best WHERE domain = 'code' AND batch_size = 1"
    )
    assert (draft, k > 0, proven) == ("draft-a", True, 1)
    assert speedup > 1.2
    rates = dict(sql(store, "SELECT domain, accept_rate FROM acceptance WHERE draft = 'draft-a'"))
    assert rates["code"] > 0.9
    assert rates["prose"] < 0.4
    assert sql(store, "SELECT draft, k FROM timed_runs WHERE setup = 'plain' LIMIT 1") == [(None, 0)]
    assert sql(store, "SELECT count(*) FROM timed_runs WHERE run_id IS NULL") == [(0,)]
    [(units, reused)] = sql(store, "SELECT measured_units, reused_units FROM run_costs")
    assert units > 100
    assert reused == 0
