"""Fixtures that several test modules share."""

import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch

from store import migrations
from store.database import Location
from store.evidence_store import EvidenceStore
from tests.support import servers, tiny
from tests.support.cli import DECIDED, call, small_run, write_prompts
from tests.support.fakes import FakeEngine


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny random model directory of three layers per architecture; tests that change files copy one first."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.write_model(root / name, name, num_layers=3) for name in tiny.ARCHITECTURES}


@pytest.fixture(scope="session")
def sound_words(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of which nothing is wrong; without drafts, ngram is tried."""
    return small_run(tiny_folders["llama"], write_prompts(tmp_path_factory.mktemp("sound") / "prompts.jsonl", 6))


@pytest.fixture(scope="session")
def sound_store(sound_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with that run in it; refused commands must not change it."""
    folder = tmp_path_factory.mktemp("store")
    assert call(folder, *sound_words).code in DECIDED
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be made; its folder is not there yet."""
    return tmp_path / "new folder" / "store.sqlite"


@pytest.fixture(params=servers.KINDS)
def location(request: pytest.FixtureRequest, path: Path) -> Iterator[Location]:
    """Where a store may be made, on every database kind: a file, and a fresh schema of a server where one is given."""
    if request.param == "sqlite":
        yield path
    else:
        with servers.schema() as url:
            yield url


@pytest.fixture
def evidence_store(location: Location) -> Iterator[EvidenceStore]:
    """An open, empty store of either kind."""
    with EvidenceStore.open(location) as opened:
        yield opened


@pytest.fixture
def fake() -> FakeEngine:
    """An engine without a model, its calls counted."""
    return FakeEngine()


@pytest.fixture(scope="session", autouse=True)
def _no_repeats() -> Iterator[None]:
    """Timed units are short, and not repeated on a busy machine: tests look at tokens and records, not at seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("profiles.timing.clock.MAX_REPEATS", 0)
        patch.setattr("profiles.engines.llamacpp.timing.PASSES", 1)
        patch.setattr("profiles.engines.llamacpp.timing.MIN_S", 0.0)
        patch.setattr("profiles.engines.llamacpp.engine.MAX_ALIVE", 16)  # a start takes seconds
        patch.setattr("tuner.search.studies.STORED_TRIALS", 5)  # a transaction each
        yield


@pytest.fixture(scope="session", autouse=True)
def _revisions_once() -> Iterator[None]:
    """An empty store is given the statements of the first one's revisions: without Alembic that takes a quarter."""
    run, location = migrations.upgrade, migrations.LOCATION
    statements: dict[str, list[tuple[str, Any]]] = {}  # by kind of database

    def upgrade(connection: sqlalchemy.Connection, revision: str = "head") -> None:
        kind, is_empty = connection.dialect.name, not sqlalchemy.inspect(connection).get_table_names()
        if not is_empty or revision != "head" or location != migrations.LOCATION:
            run(connection, revision)
        elif kind in statements:
            for statement, parameters in statements[kind]:
                connection.exec_driver_sql(statement, parameters)
        else:
            made: list[tuple[str, Any]] = []

            def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
                if not statement.lstrip().startswith(("SELECT", "PRAGMA")):
                    made.append((statement, parameters))

            sqlalchemy.event.listen(connection, "before_cursor_execute", note)
            run(connection)
            sqlalchemy.event.remove(connection, "before_cursor_execute", note)
            statements[kind] = made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "upgrade", upgrade)
        yield


@pytest.fixture(scope="session", autouse=True)
def _optuna_revisions_once() -> Iterator[None]:
    """Optuna loads its ten revisions four times for each storage that it opens."""
    name = "optuna.storages._rdb.storage._VersionManager._create_alembic_script"
    create, scripts = pkgutil.resolve_name(name), list[Any]()

    def create_once(manager: object) -> Any:
        if not scripts:
            scripts.append(create(manager))
        return scripts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, create_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are too small to share among threads, which only wait for each other on a busy machine."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of child processes
        yield
