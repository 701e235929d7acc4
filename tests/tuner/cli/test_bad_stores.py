"""A store that is newer, foreign, damaged, unreadable or not there ends a command in one line and stays as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from tests.support.cli import DECIDED, assert_refused, call, database
from tests.support.fakes import sql

Maker = Callable[[Path, Path], None]


def changed(query: str, file: str = "evidence.db") -> Maker:
    """Copies a sound store and runs `query` on one of its files."""

    def make(folder: Path, store: Path) -> None:
        shutil.copytree(store, folder)
        sql(folder / file, query)

    return make


newer = changed("UPDATE alembic_version SET version_num = '0999'")
damaged_policy = changed("UPDATE policies SET policy = '{}'")
policy_not_json = changed("UPDATE policies SET policy = 'none'")
newer_policy = changed("UPDATE policies SET policy = json_set(policy, '$.version', 99)")
damaged_report_data = changed("""UPDATE runs SET outcome = '{"dossier": {"version": 1}}'""")
newer_report_data = changed("UPDATE runs SET outcome = json_set(outcome, '$.dossier.version', 99)")
no_report_data = changed("UPDATE runs SET outcome = '{}'")
damaged_outcome = changed("UPDATE runs SET outcome = 'none'")
outcome_is_list = changed("UPDATE runs SET outcome = '[7]'")
newer_studies = changed("UPDATE alembic_version SET version_num = 'v9.9.0'", "optuna.db")


def not_sqlite(folder: Path, store: Path) -> None:
    folder.mkdir()
    database(folder).write_bytes(b"prompt,answer\n" * 500)


def foreign(folder: Path, store: Path) -> None:
    folder.mkdir()
    sql(database(folder), "CREATE TABLE invoices (id INTEGER)")


def truncated(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    sql(database(folder), "PRAGMA wal_checkpoint(TRUNCATE)")
    database(folder).write_bytes(database(folder).read_bytes()[:5000])


def a_directory(folder: Path, store: Path) -> None:
    database(folder).mkdir(parents=True)


def damaged_studies(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    (folder / "optuna.db").write_bytes(b"prompt,answer\n" * 500)


def foreign_studies(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    (folder / "optuna.db").unlink()
    sql(folder / "optuna.db", "CREATE TABLE studies (id INTEGER)")


def a_file(folder: Path, store: Path) -> None:
    folder.write_text("a file")


def an_empty_file(folder: Path, store: Path) -> None:
    folder.mkdir()
    database(folder).touch()


def nothing(folder: Path, store: Path) -> None:
    assert not folder.exists()


READERS = ("show", "lookup", "explain", "report")
VERBS = ("run", *READERS)
BAD_STORES = [
    *((verb, newer, 2, "schema 0999, this draftpick reads up to 0006") for verb in VERBS),
    *(
        (
            verb,
            not_sqlite,
            2,
            "file is not a database: it is damaged, or no store: restore a copy or name another store",
        )
        for verb in VERBS
    ),
    *((verb, foreign, 2, "the table 'invoices' of another program") for verb in VERBS),
    *((verb, truncated, 2, "broken/evidence.db: database disk image is malformed") for verb in VERBS),
    *(
        (verb, a_directory, 2, "broken/evidence.db: unable to open database file: it is a folder: name a file")
        for verb in VERBS
    ),
    *((verb, damaged_policy, 2, "broken/evidence.db: policy: Object missing required field") for verb in READERS),
    *((verb, policy_not_json, 2, "broken/evidence.db: policy is not a JSON document") for verb in READERS),
    *((verb, newer_policy, 2, "version 99 is newer than version ") for verb in READERS),
    *((verb, damaged_report_data, 2, "report data: Object missing required field") for verb in READERS[2:]),
    *((verb, newer_report_data, 2, "report data version 99 is newer than ") for verb in READERS[2:]),
    *((verb, no_report_data, 3, "no finished run of ") for verb in READERS[2:]),
    *((verb, damaged_outcome, 2, "broken/evidence.db: a row cannot be read") for verb in READERS[1:]),
    *((verb, outcome_is_list, 2, "broken/evidence.db: ") for verb in READERS[1:]),
    *((verb, a_file, 2, "broken: file is not a database") for verb in VERBS),
    *((verb, an_empty_file, 3, "no policy in store") for verb in READERS[2:]),
    ("lookup", an_empty_file, 2, "broken/evidence.db: "),
    *((verb, nothing, 3, "no store in") for verb in READERS),
]


@pytest.mark.parametrize(("verb", "make", "code", "wanted"), BAD_STORES)
def test_a_store_is_refused(
    verb: str, make: Maker, code: int, wanted: str, sound_store: Path, sound_words: list[str], tmp_path: Path
) -> None:
    """A store that cannot be read, or is not there, is named and left as it was."""
    folder = tmp_path / "broken"
    make(folder, sound_store)
    file = database(folder)
    before = file.read_bytes() if file.is_file() else None
    more = {"run": sound_words[1:], "report": ["--out", str(tmp_path / "page.html")], "lookup": ["--json"]}
    said = call(folder, verb, *more.get(verb, []))
    assert_refused(said, code, wanted)
    if make is not an_empty_file:  # which is a store without tables yet, and gets them
        assert (file.read_bytes() if file.is_file() else None) == before


@pytest.mark.parametrize("make", [damaged_studies, newer_studies, foreign_studies])
def test_a_run_goes_on_without_its_studies(
    make: Maker, sound_store: Path, sound_words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No evidence is in Optuna's database: where it is damaged, newer or another program's, a warning is logged."""
    make(tmp_path / "broken", sound_store)
    assert call(tmp_path / "broken", *sound_words).code in DECIDED
    assert "Optuna's studies are not stored: " in caplog.text


def test_a_trial_that_is_lost_ends_no_run(
    sound_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The studies' disk is full, or their server goes away, after the first evidence."""

    def lost(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("database or disk is full")

    monkeypatch.setattr(optuna.Study, "add_trials", lost)
    assert call(tmp_path, *sound_words).code in DECIDED
    assert "Optuna's studies are not stored: database or disk is full" in caplog.text
