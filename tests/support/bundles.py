"""Stores to pack and bundles to break, for the tests of bundles and of damage."""

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.records.core import PLAIN, Environment, Model, Setup
from profiles.records.errors import DraftpickError
from profiles.records.evidence import Infeasible
from store.bundle import bundle, file
from store.evidence_store import EvidenceStore, Scope
from tests.support.cli import content
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, TARGET, FakeEngine, prompts
from tuner.pipeline.pipeline import Options, Watch
from tuner.run import TuningSession
from tuner.run import tune as run

ELSEWHERE = replace(MACHINE, device="other cpu", threads=8)
SCOPE = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
Rows = list[Any]
Change = Callable[[dict[str, Any], Rows], None]


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


def opened(path: Path) -> tuple[dict[str, Any], Rows]:
    """Header and rows, read without the code under test."""
    content = path.read_bytes().split(b"\n", 1)[1]
    header, *rows = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    return header, rows


def sealed(path: Path, content: bytes) -> Path:
    """A file with a right checksum over any content."""
    path.write_bytes(f"draftpick-bundle 1 {hashlib.sha256(content).hexdigest()}\n".encode() + content)
    return path


def resealed(source: Path, path: Path, change: Change) -> Path:
    """A copy with something changed in its header or rows, counted (but for a changed header) and sealed again."""
    header, rows = opened(source)
    before = json.dumps(header)
    change(header, rows)
    if json.dumps(header) == before:
        header["rows"] = {name: sum(row[0] == name for row in rows) for name in {row[0] for row in rows}}
    file.write(path, header, [file.line_of(row) for row in rows])
    return path


def row_of(rows: Rows, table: str) -> dict[str, Any]:
    """The first row of a table."""
    found: dict[str, Any] = next(row for name, row in rows if name == table)
    return found


def refused(evidence_store: EvidenceStore, path: Path) -> str:
    """What a merge says that must fail, leaving the store as it was."""
    before = content(evidence_store.path.parent) if evidence_store.path.name == "evidence.db" else None
    with pytest.raises(DraftpickError) as caught:
        bundle.merge(evidence_store, path)
    assert before is None or content(evidence_store.path.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
