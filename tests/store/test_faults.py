"""What production does to a store's file: each fault is one clear line or a correct continuation, the file unharmed.

Children without rights or with a limit on file sizes meet the faults for real; raw SQL says what is in the file.
"""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from optuna.study import StudyDirection

from profiles.records.errors import StoreError
from store import migrations
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.store.test_file import SCOPE, save_traces
from tests.support.fakes import MACHINE, TARGET, FakeEngine, prompts, sql
from tests.support.policies import save_policy
from tuner.run import TuningSession

PROMPT = prompts(1)[0]
FIND = """
import sys
from pathlib import Path
from profiles.records.errors import StoreError
from store.evidence_store import EvidenceStore
from tests.store.test_file import SCOPE, save_traces
from tests.support.fakes import FakeEngine
path, asked = Path(sys.argv[1]), sys.argv[2]
try:
    with (EvidenceStore.open if asked == "write" else EvidenceStore.open_read_only)(path) as book:
        if asked == "write":
            save_traces(book, FakeEngine(), 100)
        print(book.latest_policy())
except StoreError as error:
    print(f"error: {error}")
"""


@pytest.fixture
def sound(path: Path) -> Path:
    """A closed store with a policy and twenty traces; its write-ahead log is folded in."""
    with EvidenceStore.open(path) as evidence_store:
        save_policy(evidence_store, "kept", TARGET, MACHINE)
        save_traces(evidence_store, FakeEngine(), 20)
    return path


@pytest.fixture
def shared(sound: Path) -> Iterator[Path]:
    """The same where nobody may write."""
    folder = Path(tempfile.mkdtemp())
    copy = folder / "store.sqlite"
    shutil.copy(sound, copy)
    copy.chmod(0o444)
    folder.chmod(0o555)
    yield copy
    folder.chmod(0o755)
    shutil.rmtree(folder)


def child(path: Path, asked: str, *, most_bytes: int | None = None, powerless: bool = False) -> str:
    """What a process says that writes to a store or reads it, bound by permissions or by a limit on file sizes."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    command = [sys.executable, "-B", "-c", FIND, str(path), asked]
    if powerless and os.geteuid() == 0:
        tied = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # permissions then hold for root too
        if not shutil.which("setpriv") or subprocess.run([*tied, "true"], capture_output=True, check=False).returncode:
            pytest.skip("root cannot give up its rights here")
        command = [*tied, *command]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit, timeout=60)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("\n") == 1
    return said.stdout.strip()


@pytest.mark.parametrize("opened", [EvidenceStore.open, EvidenceStore.open_read_only])
@pytest.mark.parametrize("size", [64, 512, 4096, 20_000, -4096])
def test_a_truncated_file_is_refused(opened: type[EvidenceStore], size: int, sound: Path) -> None:
    """In one line, and what is left stays as it was."""
    content = sound.read_bytes()[:size]
    sound.write_bytes(content)
    with pytest.raises(StoreError, match=r"(is malformed|is not a database): it is damaged, or no store") as caught:
        opened(sound)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert sound.read_bytes() == content


@pytest.mark.parametrize("version", migrations.REVISIONS[:-1])
def test_a_reader_does_not_upgrade(version: str, tmp_path: Path) -> None:
    """A file of an earlier schema is refused by a reader, who changes no byte, and read after a writer opened it."""
    path = tmp_path / "store.sqlite"
    shutil.copy(ROOT / "tests" / "assets" / f"store-{version}.sqlite", path)
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=f"it has the older schema {version}, this draftpick reads 0006: `tune.py show`"
    ):
        EvidenceStore.open_read_only(path)
    assert path.read_bytes() == before
    EvidenceStore.open(path).close()
    with EvidenceStore.open_read_only(path) as evidence_store:
        assert evidence_store.latest_policy(TARGET.name) == f'{{"made by":"{version}"}}'


def test_a_folder_that_cannot_be_written_is_read(shared: Path) -> None:
    """A serving host without rights reads the store and leaves nothing beside it; writing is refused in one line."""
    assert child(shared, "read", powerless=True) == "kept"
    refused = child(shared, "write", powerless=True)
    assert refused.startswith(f"error: store {shared}: ")
    assert "read-only: allow writing" in refused
    assert [one.name for one in shared.parent.iterdir()] == ["store.sqlite"]


def test_a_log_in_a_folder_that_cannot_be_written_is_read(shared: Path) -> None:
    """What a killed writer left in the write-ahead log belongs to the store, also for a reader without rights."""
    shared.parent.chmod(0o755)
    shared.chmod(0o644)
    with closing(sqlite3.connect(shared)) as writer:  # its open end keeps the log
        writer.execute("UPDATE policies SET policy = 'newer'")
        writer.commit()
        shared.parent.chmod(0o555)
        assert child(shared, "read", powerless=True) == "newer"


def test_odd_names_are_read(tmp_path: Path, sound: Path) -> None:
    """Signs that mean something in a URI are part of a file's name."""
    for name in ("a b?mode=rwc#c.sqlite", "50%25.sqlite", "ünï.sqlite"):
        path = tmp_path / name
        shutil.copy(sound, path)
        with EvidenceStore.open_read_only(path) as evidence_store:
            assert evidence_store.latest_policy() == "kept"
    assert sorted(one.name[:2] for one in tmp_path.glob("*.sqlite")) == ["50", "a ", "ün"]


@pytest.mark.parametrize("room", [0, 40_000])
def test_a_full_disk_keeps_what_was_saved(room: int, sound: Path) -> None:
    """A writer whose file cannot grow says so in one line; units before are whole, and a later run goes on."""
    refused = child(sound, "write", most_bytes=sound.stat().st_size + room)
    assert refused.startswith(f"error: store {sound}: ")
    assert "the disk failed or is full: what was saved before is kept" in refused or "is full" in refused
    [(saved,)] = sql(sound, "SELECT count(*) FROM target_traces")
    assert 20 <= saved < 100
    assert sql(sound, "PRAGMA integrity_check") == [("ok",)]
    assert child(sound, "write") == "kept"
    assert sql(sound, "SELECT count(*) FROM target_traces") == [(100,)]


def test_a_damaged_row_is_told_whatever_its_damage(sound: Path) -> None:
    """JSON of another shape, another type or no text at all: one line."""
    for damage in ("'{}'", "x'62'", "'7'", "'[[1]]'", "NULL", "x'ff00'", "'\"x\"'", f"'{'[' * 100_000}'"):
        with closing(sqlite3.connect(sound)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            columns = "token_ids" if damage != "NULL" else "prompt_digest = prompt_digest, ended"
            connection.execute(f"UPDATE target_traces SET {columns} = {damage if damage != 'NULL' else 7}")
            connection.commit()
        with EvidenceStore.open_read_only(sound) as evidence_store, pytest.raises(StoreError) as caught:
            evidence_store.find_target_trace(SCOPE, PROMPT)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"store {sound}: ")


def test_a_reader_leaves_no_file_behind(sound: Path) -> None:
    """Neither a log nor shared memory, which would lock out the owner where another user made them."""
    before = {file.name: file.read_bytes() for file in sound.parent.iterdir()}
    with EvidenceStore.open_read_only(sound) as evidence_store:
        assert evidence_store.latest_policy() == "kept"
        assert {file.name: file.read_bytes() for file in sound.parent.iterdir()} == before
    assert {file.name: file.read_bytes() for file in sound.parent.iterdir()} == before


def test_a_reader_without_the_right_to_write_leaves_no_file_behind(sound: Path) -> None:
    """A file of another user, in a folder where everybody may make files."""
    sound.chmod(0o444)
    assert child(sound, "read", powerless=True) == "kept"
    assert [file.name for file in sound.parent.iterdir()] == [sound.name]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_moved_while_it_is_open_is_noticed(is_replaced: bool, sound: Path) -> None:
    """Before a row is saved where nobody finds it, also when another store has its name by then."""
    trace = FakeEngine().trace_target(SCOPE.workload, prompts(30)[29])
    with EvidenceStore.open(sound) as evidence_store:
        sound.rename(sound.with_name("moved.sqlite"))
        if is_replaced:
            shutil.copy(ROOT / "tests" / "assets" / "store-0003.sqlite", sound)
        with pytest.raises(StoreError, match=r"the file was (deleted or moved|replaced by another) while it was open"):
            evidence_store.save_target_trace(SCOPE, prompts(30)[29], trace)
        sound.with_name("moved.sqlite").rename(sound)
        assert evidence_store.save_target_trace(SCOPE, prompts(30)[29], trace) == trace
    assert sql(sound, "SELECT count(*) FROM target_traces") == [(21,)]


def test_a_folder_with_signs_of_a_url_has_its_own_studies(tmp_path: Path) -> None:
    """A question mark in the store's name is part of the name for Optuna too."""
    folder = tmp_path / "what?now=1"
    with EvidenceStore.open(folder / "evidence.db") as evidence_store:
        studies = TuningSession.of(evidence_store).studies
        studies.create_new_study([StudyDirection.MAXIMIZE], "one")
    assert sql(folder / "optuna.db", "SELECT study_name FROM studies") == [("one",)]
    assert [file.name for file in tmp_path.iterdir()] == ["what?now=1"]
