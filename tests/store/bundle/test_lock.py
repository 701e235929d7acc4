"""A merge keeps other writers out only while it compares and inserts, and sees what they wrote until then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from profiles.records.errors import StoreError
from store.bundle import bundle, file
from store.evidence_store import EvidenceStore
from tests.support.bundles import ELSEWHERE, fill, save_sample
from tests.support.cli import content, database
from tests.support.fakes import sql


class Watched:
    """A book that says when it is asked for the write lock."""

    def __init__(self, evidence_store: EvidenceStore, before: Callable[[], object]) -> None:
        self.evidence_store, self.before, self.is_held = evidence_store, before, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evidence_store, name)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        self.before()
        with self.evidence_store.writing() as connection:
            self.is_held = True
            yield connection
        self.is_held = False


def packed(folder: Path, seed: int) -> Path:
    """The bundle of one unit of runs; the same unit for every seed."""
    with EvidenceStore.open(folder / f"{seed}.db") as evidence_store:
        save_sample(evidence_store, seed)
        bundle.pack(evidence_store, folder / f"{seed}.bundle")
    return folder / f"{seed}.bundle"


def test_nothing_is_parsed_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read and checked before; a merge that finds nothing new takes no lock at all."""
    with EvidenceStore.open(tmp_path / "theirs.db") as evidence_store:
        fill(evidence_store, ELSEWHERE)
        bundle.pack(evidence_store, tmp_path / "b")
    with EvidenceStore.open(database(tmp_path / "here")) as evidence_store:
        asked: list[int] = []
        watched = Watched(evidence_store, lambda: asked.append(1))
        parse = file.strictly_parsed

        def parsed(text: bytes) -> Any:
            assert not watched.is_held
            return parse(text)

        monkeypatch.setattr(file, "strictly_parsed", parsed)
        assert bundle.merge(watched, tmp_path / "b").added["samples"] > 0  # type: ignore[arg-type]
        assert asked == [1]
        assert bundle.merge(watched, tmp_path / "b").added == {}  # type: ignore[arg-type]
        assert asked == [1]


def test_what_another_writes_meanwhile_counts(tmp_path: Path) -> None:
    """Evidence that another writer saved after the comparison and before the lock is known, or refused as unlike."""
    ours = packed(tmp_path, 0)
    with EvidenceStore.open(database(tmp_path / "same")) as evidence_store:
        same = Watched(evidence_store, lambda: bundle.merge(evidence_store, ours))
        assert bundle.merge(same, ours).known["samples"] == 1  # type: ignore[arg-type]
        assert sql(evidence_store.path, "SELECT count(*) FROM samples") == [(1,)]
    with EvidenceStore.open(database(tmp_path / "other")) as evidence_store:
        other = Watched(evidence_store, lambda: bundle.merge(evidence_store, ours))
        with pytest.raises(StoreError, match="unlike evidence in samples"):
            bundle.merge(other, packed(tmp_path, 1))  # type: ignore[arg-type]
        before = content(tmp_path / "other")
        assert bundle.merge(evidence_store, packed(tmp_path, 1), keep_mine=True).unlike == {"samples": 1}
        assert content(tmp_path / "other") == before


def test_a_large_bundle_waits_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked units beyond what memory may hold are kept in a file meanwhile."""
    monkeypatch.setattr(bundle, "HELD_BYTES", 1)
    with EvidenceStore.open(database(tmp_path / "here")) as evidence_store:
        assert bundle.merge(evidence_store, packed(tmp_path, 0)).added["samples"] == 1
