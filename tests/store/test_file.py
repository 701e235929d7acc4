"""The store's file survives mishaps: other versions, other programs, locks, a full disk and killed processes.

What is in the file is checked with raw SQL, not with the code under test.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from alembic.script import ScriptDirectory

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import StoreError
from store import location, migrations, tables
from store.evidence_store import EvidenceStore, Scope
from tests import ROOT
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts, sql

RELEASED_0001 = ROOT / "tests" / "assets" / "store-0001.sqlite"
PROMPT, OTHER = prompts(2)
A4 = Setup(draft=DRAFT_A, length=4)
DRAFTS = (DRAFT_A, NGRAM)
SCOPE = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)


@pytest.fixture
def evidence_store(path: Path) -> Iterator[EvidenceStore]:
    """An open, empty store in a file."""
    with EvidenceStore.open(path) as opened:
        yield opened


def save_traces(evidence_store: EvidenceStore, fake: FakeEngine, count: int) -> None:
    for prompt in prompts(count):
        evidence_store.save_target_trace(SCOPE, prompt, fake.trace_target(GREEDY, prompt))


class TestTheFile:
    def test_the_database_is_set_up_for_safety(self, evidence_store: EvidenceStore) -> None:
        """Write-ahead log, foreign keys and a busy timeout are on, and the folder was made."""
        assert sql(evidence_store.database.path, "PRAGMA journal_mode") == [("wal",)]
        with evidence_store.database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1

    def test_revisions_and_tables_agree(self, evidence_store: EvidenceStore) -> None:
        """On what Alembic does not compare in a file: unique constraints and foreign keys."""
        with evidence_store.reading() as connection:
            inspector = sqlalchemy.inspect(connection)
            for table in tables.ABOUT_TARGETS:
                unique = [columns["column_names"] for columns in inspector.get_unique_constraints(table.name)]
                planned = [
                    [column.name for column in constraint.columns]
                    for constraint in table.constraints
                    if isinstance(constraint, sqlalchemy.UniqueConstraint)
                ]
                assert unique == planned
                assert len(inspector.get_foreign_keys(table.name)) == len(table.foreign_keys)

    def test_the_revisions_are_those_of_alembic(self) -> None:
        """What a reader compares with, without Alembic, is what Alembic finds in the folder."""
        scripts = ScriptDirectory(str(migrations.LOCATION))
        assert [script.revision for script in scripts.walk_revisions()] == list(reversed(migrations.REVISIONS))
        assert scripts.get_current_head() == migrations.HEAD

    @pytest.mark.parametrize("version", migrations.REVISIONS[:-1])
    def test_a_released_file_is_opened_and_read(self, version: str, tmp_path: Path) -> None:
        """A file written at an earlier schema (all of it asked of FakeEngine) opens here and gives its evidence."""
        path = tmp_path / "store.sqlite"
        shutil.copy(ROOT / "tests" / "assets" / f"store-{version}.sqlite", path)
        fake = FakeEngine()
        assert sql(path, "SELECT version_num FROM alembic_version") == [(version,)]
        rows = f"WHERE environment_digest = '{MACHINE.digest}' ORDER BY id" if version < "0005" else "ORDER BY position"
        decode_s = sql(path, f"SELECT decode_s FROM samples {rows}")
        with EvidenceStore.open(path) as evidence_store:
            trace = fake.trace_target(GREEDY, PROMPT)
            assert evidence_store.find_target_trace(SCOPE, PROMPT) == trace
            for draft in DRAFTS:
                stored = evidence_store.find_acceptance(SCOPE, PROMPT, draft, 4)
                assert stored == fake.trace_draft(GREEDY, PROMPT, trace, draft, 4)
            assert evidence_store.find_step_times(SCOPE, DRAFTS, context_length=96, max_length=4) == fake.time_steps(
                GREEDY, 96, 4
            )
            stored_runs = evidence_store.find_samples(SCOPE, (PROMPT,), (PLAIN, A4), "proof 0")
            assert stored_runs is not None
            assert [run.decode_s for run in stored_runs] == [seconds for (seconds,) in decode_s]
            like_today = fake.run_together(GREEDY, (PROMPT,), (PLAIN, A4), "proof 0")
            for old, new in zip(stored_runs, like_today, strict=True):
                if version == "0001":  # it did not say yet what its rounds ran, and a draft's first steps were narrower
                    assert old == replace(new, decode_s=old.decode_s, shapes={}, refills=0)
                else:
                    assert old == new
            assert evidence_store.latest_policy(TARGET.name) == f'{{"made by":"{version}"}}'
        assert sql(path, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]

    def test_an_older_schema_is_upgraded_in_one_transaction(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A later revision is applied at opening; one that fails halfway leaves the file as it was."""
        path, scripts = tmp_path / "store.sqlite", tmp_path / "migrations"
        shutil.copy(RELEASED_0001, path)
        shutil.copytree(migrations.LOCATION, scripts)
        monkeypatch.setattr(migrations, "LOCATION", scripts)
        later = scripts / "versions" / "9999_later.py"
        head = "from alembic import op\nrevision, down_revision = '9999', '0006'\ndef upgrade():\n"
        add = "    op.execute('ALTER TABLE runs ADD COLUMN host VARCHAR')\n"
        later.write_text(head + add + "    op.execute('ALTER TABLE nowhere ADD COLUMN host VARCHAR')\n")
        with pytest.raises(StoreError, match="no such table: nowhere"):
            EvidenceStore.open(path)
        assert sql(path, "SELECT version_num FROM alembic_version") == [("0001",)]
        assert sql(path, "SELECT count(*) FROM pragma_table_info('runs') WHERE name = 'host'") == [(0,)]
        later.write_text(head + add + "\n")
        with EvidenceStore.open(path) as evidence_store:
            assert evidence_store.find_target_trace(SCOPE, PROMPT) == FakeEngine().trace_target(GREEDY, PROMPT)
        assert sql(path, "SELECT version_num FROM alembic_version") == [("9999",)]
        assert sql(path, "SELECT count(*) FROM pragma_table_info('runs') WHERE name = 'host'") == [(1,)]

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        """A file where the folder should be is told in one line."""
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="its folder cannot be made: "):
            EvidenceStore.open(tmp_path / "file" / "store.sqlite")


class TestMishaps:
    def test_the_book_loads_no_heavy_library(self, path: Path) -> None:
        """Looking into the store needs neither torch, transformers, optuna, Alembic nor another database's driver."""
        heavy = {"torch", "transformers", "optuna", "alembic", "mako", "psycopg", "numpy"}
        code = (
            "import sys, pathlib, store.cached_engine, store.inventory\n"
            "store.evidence_store.EvidenceStore.open_read_only(pathlib.Path(sys.argv[1])).close()\n"
            f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
        )
        EvidenceStore.open(path).close()
        assert subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=ROOT).returncode == 0


def test_a_checkout_reads_the_store_of_make_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its `.draftpick` is there; without it, and in an installation, the user's data folder."""
    monkeypatch.delenv("DRAFTPICK_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(location, "__file__", str(tmp_path / "store" / "location.py"))
    user = location.store_location(None)
    assert tmp_path / "data" in Path(user).parents
    (tmp_path / ".draftpick").mkdir()
    assert location.store_location(None) == user
    (tmp_path / "tune.py").touch()
    assert location.store_location(None) == tmp_path / ".draftpick" / "evidence.db"
    monkeypatch.setenv("DRAFTPICK_STORE", str(tmp_path / "other"))
    assert location.store_location(None) == tmp_path / "other" / "evidence.db"


@pytest.mark.parametrize("url", ["sqlite:evidence.db", "sqlite://"])
def test_a_sqlite_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="sqlite:///FILE"):
        location.store_location(url)
