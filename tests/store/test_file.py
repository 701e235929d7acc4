"""The store's file survives mishaps: other versions, other programs, locks, a full disk and killed processes.

What is in the file is checked with raw SQL, not with the code under test.
"""

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import NewerStoreError, StoreError
from store import migrations, tables
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


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


class TestTheFile:
    def test_the_database_is_set_up_for_safety(self, evidence_store: EvidenceStore) -> None:
        """Write-ahead log, foreign keys and a busy timeout are on, and the folder was made."""
        assert sql(evidence_store.path, "PRAGMA journal_mode") == [("wal",)]
        with evidence_store.database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1

    def test_revisions_and_tables_agree(self, evidence_store: EvidenceStore) -> None:
        """The schema that the revisions make is the one the code is written against."""
        engine = sqlalchemy.create_engine(f"sqlite:///{evidence_store.path}")
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
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
        engine.dispose()

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

    def test_a_newer_schema_is_refused(self, path: Path) -> None:
        """A file of a later draftpick is left alone, and the error names both versions."""
        EvidenceStore.open(path).close()
        sql(path, "UPDATE alembic_version SET version_num = '9998'")
        with pytest.raises(NewerStoreError, match="schema 9998, this draftpick reads up to 0006"):
            EvidenceStore.open(path)
        assert sql(path, "SELECT version_num FROM alembic_version") == [("9998",)]

    def test_another_programs_file_is_refused(self, path: Path) -> None:
        """A database that is not ours gets no tables of ours."""
        path.parent.mkdir()
        sql(path, "CREATE TABLE songs (name TEXT)")
        with pytest.raises(StoreError, match="the table 'songs' of another program"):
            EvidenceStore.open(path)
        assert sql(path, "SELECT name FROM sqlite_master") == [("songs",)]

    def test_a_file_that_is_no_database_is_refused(self, path: Path) -> None:
        """Text instead of a database is told in one line, and the file stays as it was."""
        path.parent.mkdir()
        path.write_text("not a database\n" * 100)
        with pytest.raises(StoreError, match="file is not a database: it is not a SQLite database") as caught:
            EvidenceStore.open(path)
        assert "\n" not in str(caught.value)
        assert path.read_text() == "not a database\n" * 100

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        """A file where the folder should be, or a folder where the file should be, is told in one line."""
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="its folder cannot be made: "):
            EvidenceStore.open(tmp_path / "file" / "store.sqlite")
        with pytest.raises(StoreError, match="unable to open database file"):
            EvidenceStore.open(tmp_path)

    def test_a_damaged_row_is_told(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A row that is no longer a valid record is an error of the store, not a number."""
        evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
        for damage, reason in (("'[1, 2'", "not an array of numbers"), ("x'62'", "a target trace is empty")):
            sql(evidence_store.path, f"UPDATE target_traces SET token_ids = {damage}")
            with pytest.raises(StoreError, match=f"a row cannot be read or written: .*{reason}"):
                evidence_store.find_target_trace(SCOPE, PROMPT)


class TestMishaps:
    def test_a_locked_store_is_told(self, path: Path, fake: FakeEngine) -> None:
        """When another process does not let go, the error says so and nothing is lost."""
        with EvidenceStore.open(path, busy_timeout_s=0.1) as evidence_store, closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="database is locked: another process keeps it locked"):
                evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
            other.rollback()
            evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
        assert sql(path, "SELECT count(*) FROM target_traces") == [(1,)]

    def test_a_read_only_store_is_told(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A store that cannot be written can still be read."""
        trace = fake.trace_target(GREEDY, PROMPT)
        evidence_store.save_target_trace(SCOPE, PROMPT, trace)
        with evidence_store.database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match="readonly database: it is read-only"):
            evidence_store.save_target_trace(SCOPE, OTHER, fake.trace_target(GREEDY, OTHER))
        assert evidence_store.find_target_trace(SCOPE, PROMPT) == trace

    def test_a_full_disk_loses_nothing(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """When the disk is full, the unit under way fails as a whole and all before it stay."""
        [(pages,)] = sql(evidence_store.path, "PRAGMA page_count")
        with evidence_store.database.engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 12}")
        with pytest.raises(StoreError, match=r"is full: .*what was saved before is kept") as caught:
            save_traces(evidence_store, fake, 100)
        assert "\n" not in str(caught.value)
        [(saved,)] = sql(evidence_store.path, "SELECT count(*) FROM target_traces")
        assert 2 <= saved < 100
        assert [evidence_store.find_target_trace(SCOPE, prompt) is not None for prompt in prompts(100)].index(
            False
        ) == saved
        assert sql(evidence_store.path, "PRAGMA integrity_check") == [("ok",)]
        with evidence_store.database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 100000")
        save_traces(evidence_store, fake, saved + 1)
        assert sql(evidence_store.path, "SELECT count(*) FROM target_traces") == [(saved + 1,)]

    def test_a_killed_process_loses_at_most_one_unit(self, path: Path) -> None:
        """After kill -9 in a loop of saves, all units told of are there, whole, and at most one more."""
        saver = python(
            "from pathlib import Path\n"
            "from store.evidence_store import EvidenceStore\n"
            "from tests.store import test_file as t\n"
            f"evidence_store = EvidenceStore.open(Path({str(path)!r}))\n"
            "for n in range(100000):\n"
            "    units = t.FakeEngine().run_together(t.GREEDY, (t.PROMPT,), (t.PLAIN, t.A4), f'race {n}')\n"
            "    evidence_store.save_samples(t.SCOPE, (t.PROMPT,), (t.PLAIN, t.A4), f'race {n}', units)\n"
            "    print(n, flush=True)\n"
        )
        assert saver.stdout is not None
        told = [saver.stdout.readline() for _ in range(20)]
        saver.send_signal(signal.SIGKILL)
        told += saver.communicate()[0].splitlines()
        units = sql(path, "SELECT count(*) FROM samples GROUP BY unit_id")
        assert saver.returncode == -signal.SIGKILL
        assert set(units) == {(2,)}
        assert len(told) <= len(units) <= len(told) + 1
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]

    def test_processes_may_open_a_fresh_store_at_once(self, path: Path) -> None:
        """Whoever comes first makes the tables; the others wait and find them."""
        code = (
            "from pathlib import Path\n"
            "from store.evidence_store import EvidenceStore\n"
            "print('ready', flush=True)\n"
            "input()\n"
            f"EvidenceStore.open(Path({str(path)!r})).close()\n"
        )
        openers = [python(code) for _ in range(3)]
        for opener in openers:
            assert opener.stdout is not None
            assert opener.stdout.readline() == "ready\n"
        for opener in openers:
            assert opener.stdin is not None
            opener.stdin.write("go\n")
            opener.stdin.flush()
        for opener in openers:
            opener.communicate(timeout=60)
            assert opener.returncode == 0
        assert sql(path, "SELECT version_num FROM alembic_version") == [("0006",)]

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
