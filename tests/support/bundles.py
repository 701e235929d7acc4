"""Stores to pack and bundles to break, for the tests of bundles and of damage."""

import contextlib
import hashlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Environment, Model, Setup
from profiles.records.errors import DraftpickError
from profiles.records.evidence import Infeasible
from store.evidence_store import EvidenceStore, Scope
from tests.support.cli import content
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, TARGET, FakeEngine, prompts
from tuner.bundle import bundle
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession
from tuner.run import tune as run

ELSEWHERE = replace(MACHINE, device="other cpu", threads=8)
SCOPE = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)


def named(path: str) -> Model:
    """The fake target as a user names it by a path."""
    return replace(TARGET, name=path)


def fill(evidence_store: EvidenceStore, environment: Environment = MACHINE, target: Model = TARGET) -> None:
    """One short run with a policy, and a setup that failed."""
    engine = FakeEngine(keep=0.95)
    engine.drafts, engine.environment, engine.target = (DRAFT_A,), environment, target
    run(engine, [(GREEDY, prompts(30))], TuningSession.of(evidence_store), Options(lengths=(2,)), Watch())
    scope = replace(SCOPE, environment=environment, target=target)
    failed = Setup(draft=DRAFT_A, length=64)
    evidence_store.save_infeasible(scope, Infeasible(setup=failed, reason="OutOfMemoryError", detail="no memory"))


def save_sample(evidence_store: EvidenceStore, seed: int, environment: Environment = MACHINE) -> None:
    """A unit of one timed run; another seed takes other seconds."""
    scope, [prompt] = replace(SCOPE, environment=environment), prompts(1)
    samples = FakeEngine(seed=seed).run_together(GREEDY, (prompt,), (PLAIN,), "proof 0")
    evidence_store.save_samples(scope, (prompt,), (PLAIN,), "proof 0", samples)


def update(table: str, column: str, value: object) -> tuple[str, tuple[object, ...]]:
    return f"UPDATE {table} SET {column} = ?", (value,)


def sealed(path: Path, content: bytes) -> Path:
    """A file with the right checksum behind any content."""
    path.write_bytes(content + hashlib.sha256(content).digest())
    return path


def resealed(source: Path, path: Path, *statements: str | tuple[str, tuple[object, ...]]) -> Path:
    """A copy of a bundle after SQL statements, with a right checksum again."""
    path.write_bytes(source.read_bytes()[:-32])
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(*((statement,) if isinstance(statement, str) else statement))
    return sealed(path, path.read_bytes())


def refused(evidence_store: EvidenceStore, path: Path) -> str:
    """What a merge says that must fail, leaving the store as it was."""
    file = evidence_store.database.path
    before = content(file.parent) if file.name == "evidence.db" else None
    with pytest.raises(DraftpickError) as caught:
        bundle.merge(evidence_store, path)
    assert before is None or content(file.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
