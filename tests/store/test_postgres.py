"""A store on PostgreSQL: what can go wrong between here and the server ends in one line that holds no password.

Needs a server: `.ci/postgres COMMAND` starts one.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import Connection

from profiles.records.errors import StoreError
from store import database as connections
from store import migrations, tables
from store.evidence_store import EvidenceStore
from tests.store.test_evidence_store import SCOPE
from tests.support import servers
from tests.support.cli import DECIDED, assert_refused, call
from tests.support.fakes import GREEDY, MACHINE, TARGET, FakeEngine, prompts
from tests.support.policies import save_policy
from tests.support.servers import ask, run_sql
from tuner.dry_run import dry_run
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession, tune

PROMPT, OTHER = prompts(2)
SECRET = "s3cret"


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A fresh schema; files on this host go to a folder of the test."""
    monkeypatch.setenv("DRAFTPICK_STORE", str(tmp_path / "home"))
    with servers.schema() as made:
        yield made


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A server that no other test uses: this one may be stopped."""
    monkeypatch.setenv("DRAFTPICK_STORE", str(tmp_path / "home"))
    with servers.another() as made:
        yield made


@pytest.fixture
def role(url: str) -> Iterator[str]:
    """A role that may only look into the schema, after a book is in it: the URL with its password."""
    with EvidenceStore.open(url) as evidence_store:
        save_policy(evidence_store, "one", TARGET, MACHINE)
    name = sqlalchemy.make_url(url).query["options"].removeprefix("-csearch_path=")
    reader = f"reader_{name}"
    run_sql(url, f"CREATE ROLE {reader} LOGIN PASSWORD '{SECRET}'")
    run_sql(url, f"GRANT USAGE ON SCHEMA {name} TO {reader}")
    run_sql(url, f"GRANT SELECT ON ALL TABLES IN SCHEMA {name} TO {reader}")
    yield sqlalchemy.make_url(url).set(username=reader, password=SECRET).render_as_string(hide_password=False)
    run_sql(url, f"DROP OWNED BY {reader}")
    run_sql(url, f"DROP ROLE {reader}")


def terminate(url: str, evidence_store: EvidenceStore) -> None:
    """Ends the connections that the book keeps, as a restart of the server does."""
    with evidence_store.reading() as connection:
        pid = connection.connection.driver_connection.info.backend_pid
    run_sql(url, f"SELECT pg_terminate_backend({pid}, 5000)")


class TestTheServer:
    @pytest.mark.parametrize(
        ("changes", "wanted"),
        [
            ({"password": SECRET}, "password authentication failed for user .*: .* correct the URL"),
            ({"password": None}, "no password supplied: .* correct the URL"),
            ({"database": "nowhere"}, 'database "nowhere" does not exist: .* correct the URL'),
            ({"port": 1}, "Connection refused: what was saved before is kept; start the server"),
            ({"host": "nowhere.invalid", "password": SECRET}, "nowhere.invalid.*start the server, or correct the URL"),
        ],
    )
    def test_a_server_that_does_not_let_us_in_is_told(self, changes: dict[str, object], wanted: str, url: str) -> None:
        """User, database, host and port: each is named with what to do; the password is in no message."""
        wrong = sqlalchemy.make_url(url).set(**changes)
        if changes.get("password", "") is None:
            wrong = sqlalchemy.URL.create(**{**wrong._asdict(), "password": None})
        for opened in (EvidenceStore.open, EvidenceStore.open_read_only):
            with pytest.raises(StoreError, match=wanted) as caught:
                opened(wrong.render_as_string(hide_password=False))
            said = str(caught.value)
            assert said.startswith("store postgresql+psycopg://")
            assert "\n" not in said
            assert SECRET not in said
            assert str(sqlalchemy.make_url(url).password) not in said

    def test_a_name_holds_no_password(self, url: str) -> None:
        """Neither the one before the host, nor one among the options."""
        hidden = sqlalchemy.make_url(url).update_query_dict({"password": SECRET})
        with EvidenceStore.open(url) as evidence_store:
            for name in (evidence_store.name, connections.name_of(hidden.render_as_string(hide_password=False))):
                assert name.startswith("postgresql+psycopg://draftpick:***@127.0.0.1:")
                assert SECRET not in name
            assert evidence_store.database.path is None

    def test_whole_numbers_have_64_bits(self, url: str) -> None:
        with EvidenceStore.open(url) as evidence_store:
            save_policy(evidence_store, "one", replace(TARGET, num_params=2_000_000_000_000), MACHINE)
        assert ask(url, "SELECT num_params FROM models") == [(2_000_000_000_000,)]

    def test_rows_of_an_older_schema_are_upgraded(self, url: str) -> None:
        """As in a file: samples find their units, the newest policy stays the newest, and ids go on."""
        database = connections.connect(url, 30.0)
        with database.transaction("write") as connection:
            migrations.upgrade(connection, "0004")
            added_later = {"vocab_size", "stored_type"}
            model = {name: value for name, value in tables.model_row(TARGET).items() if name not in added_later}
            connection.execute(sqlalchemy.insert(tables.models).values(model))
            connection.execute(sqlalchemy.insert(tables.environments).values(tables.environment_row(MACHINE)))
            connection.commit()
        database.close()
        about = f"'{TARGET.run_digest}', '{MACHINE.digest}'"
        now, before = "'2026-01-02T00:00:00+00:00'", "'2026-01-01T00:00:00+00:00'"
        for number, made, text in ((7, now, "newer"), (8, before, "older")):
            ask(url, f"INSERT INTO policies VALUES ({number}, {about}, {made}, '{text}')")
        for number, setup, name in ((0, "p", "plain"), (1, "a", "draft-a k=4")):
            values = f"{about}, {now}, 'unit', {number}, '{GREEDY.timing_digest}', 'race 0', '{setup}', '{name}'"
            ask(
                url,
                "INSERT INTO samples (target_key, environment_digest, measured_at, unit, position, anchor_digest, "
                "occasion, setup_digest, setup_name, prompt_digest, ttft_s, decode_s, output_tokens, rounds, "
                f"output_digest, disturbed) VALUES ({values}, 'x', 0.1, 1.0, 11, '[[4, 2, 20]]', 'o', false)",
            )
        ask(
            url,
            "INSERT INTO target_traces (target_key, environment_digest, measured_at, sampling_digest, prompt_digest, "
            f"token_ids, target_probs, logit_gaps, ended) VALUES ({about}, {now}, '{GREEDY.sampling_digest}', "
            f"'{PROMPT.digest}', '[5, 6]', '[0.5, 0.25]', '[1.0, 2.0]', false)",
        )
        with EvidenceStore.open(url) as evidence_store:
            trace = evidence_store.find_target_trace(SCOPE, PROMPT)
            assert (trace.token_ids, trace.target_probs) == ((5, 6), (0.5, 0.25))
            assert evidence_store.latest_policy() == "newer"
            evidence_store.replace_policy(TARGET, MACHINE, lambda latest: f"after {latest}")
            assert evidence_store.latest_policy() == "after newer"
        query = "SELECT batch_size, setup, draft, k, tok_per_s FROM timed_runs ORDER BY k"
        assert ask(url, query) == [(1, "plain", None, 0, 10.0), (1, "draft-a k=4", "draft-a", 4, 10.0)]
        assert ask(url, "SELECT id, generation FROM policies ORDER BY id") == [(7, 2), (8, 1), (9, 3)]

    @pytest.mark.parametrize("name", ['My "own" schema', "back\\slash"])
    def test_studies_have_a_schema_beside_the_stores(self, name: str) -> None:
        """Both programs keep an `alembic_version`; a name with blanks and quotes is spelled for the server."""
        server = servers.server()
        spelled = name.replace('"', '""')
        escaped = spelled.replace("\\", "\\\\").replace(" ", "\\ ")
        url = server.update_query_dict({"options": f'-csearch_path="{escaped}"'}).render_as_string(hide_password=False)
        try:
            run_sql(server, f'CREATE SCHEMA "{spelled}"')
            with EvidenceStore.open(url) as evidence_store:
                assert TuningSession.of(evidence_store).studies.get_all_studies() == []
            query = (
                f"SELECT count(*) FROM pg_tables WHERE tablename = 'alembic_version' AND schemaname LIKE '{name[:4]}%'"
            )
            assert run_sql(server, query) == [(2,)]
        finally:
            run_sql(server, f'DROP SCHEMA IF EXISTS "{spelled}", "{spelled}_optuna" CASCADE')


class TestMishaps:
    def test_a_role_that_may_only_read(self, role: str, url: str) -> None:
        """It reads either way; saving is refused in one line and changes nothing."""
        with EvidenceStore.open(role) as evidence_store, EvidenceStore.open_read_only(role) as reader:
            assert evidence_store.latest_policy() == reader.latest_policy() == "one"
            with pytest.raises(
                StoreError, match=r"permission denied for table .*: it is read-only: allow writing, grant the right"
            ) as caught:
                save_policy(evidence_store, "two", TARGET, MACHINE)
        assert "\n" not in str(caught.value)
        assert ask(url, "SELECT policy FROM policies") == [("one",)]

    def test_a_role_that_may_not_make_tables(self, role: str, url: str) -> None:
        """A store that would have to be made is refused."""
        tables = "SELECT string_agg(tablename, ', ') FROM pg_tables WHERE schemaname = current_schema()"
        ask(url, f"DROP TABLE {ask(url, tables)[0][0]} CASCADE")
        with pytest.raises(StoreError, match=r"permission denied for schema .*: it is read-only"):
            EvidenceStore.open(role)

    def test_a_connection_lost_between_two_units_is_made_again(self, url: str) -> None:
        """The server was restarted while the second unit was measured."""
        fake = FakeEngine()
        with EvidenceStore.open(url) as evidence_store:
            evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
            terminate(url, evidence_store)
            evidence_store.save_target_trace(SCOPE, OTHER, fake.trace_target(GREEDY, OTHER))
            assert evidence_store.find_target_trace(SCOPE, PROMPT) is not None
        assert ask(url, "SELECT count(*) FROM target_traces") == [(2,)]

    def test_a_server_that_stays_away_is_told(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An open book tries for its timeout, to read and to write, and then says so in one line."""
        with EvidenceStore.open(url, busy_timeout_s=0.2) as evidence_store:
            terminate(url, evidence_store)
            monkeypatch.setattr(evidence_store.database.engine.dialect, "connect", self._refuse)
            for ask_book in (evidence_store.latest_policy, lambda: save_policy(evidence_store, "one", TARGET, MACHINE)):
                started = time.monotonic()
                with pytest.raises(
                    StoreError, match="Connection refused: what was saved before is kept; start the server"
                ) as caught:
                    ask_book()
                assert 0.2 < time.monotonic() - started < 5.0
                assert "\n" not in str(caught.value)

    @staticmethod
    def _refuse(*_: object, **__: object) -> None:
        raise psycopg.OperationalError('connection failed: connection to server at "h" failed: Connection refused')

    @pytest.mark.parametrize("losses", [1, 10_000])
    def test_a_connection_lost_in_a_commit(self, losses: int, url: str) -> None:
        """The unit is saved again as a whole; a server that stays away is told in one line."""
        tries = 0

        def work(connection: Connection) -> str:
            nonlocal tries
            tries += 1
            pid = connection.connection.driver_connection.info.backend_pid
            connection.execute(sqlalchemy.insert(tables.models).values(tables.model_row(TARGET)))
            if tries <= losses:
                run_sql(url, f"SELECT pg_terminate_backend({pid}, 5000)")
            return "saved"

        with EvidenceStore.open(url, busy_timeout_s=0.5) as evidence_store:
            if losses == 1:
                assert evidence_store.database.write(work) == "saved"
            else:
                with pytest.raises(StoreError, match="what was saved before is kept") as caught:
                    evidence_store.database.write(work)
                assert "\n" not in str(caught.value)
        assert ask(url, "SELECT count(*) FROM models") == [(int(losses == 1),)]

    def test_numbers_the_server_cannot_hold_are_told(self, url: str) -> None:
        """More than 64 bits: one line, nothing saved."""
        model = replace(TARGET, num_params=2**70)
        with (
            EvidenceStore.open(url) as evidence_store,
            pytest.raises(StoreError, match=r"out of range|numeric") as caught,
        ):
            save_policy(evidence_store, "one", model, MACHINE)
        assert "\n" not in str(caught.value)


def stop_and_start(url: str, down_s: float) -> None:
    """Kills the server, as a crash does, and starts it again after some seconds."""
    [(folder,)] = run_sql(url, "SHOW data_directory")
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    options = (Path(folder) / "postmaster.opts").read_text().split(" ", 1)[1].replace('"', "").strip()
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    pg_ctl = [*user, str(binaries / "pg_ctl"), "-D", folder, "-s"]
    log = ["-l", f"{folder}/log"]
    subprocess.run([*pg_ctl, "-m", "immediate", "stop"], check=True, cwd="/")
    time.sleep(down_s)
    subprocess.run([*pg_ctl, *log, "-o", options, "-w", "start"], check=True, cwd="/")


@pytest.mark.slow
def test_a_run_survives_a_server_that_is_down_for_seconds(own_server: str) -> None:
    """Killed in the middle of a run: the run waits, goes on and ends with a policy."""

    class Stopping(FakeEngine):
        units = 0

        def run_together(self, workload, prompts, setups, purpose):  # type: ignore[no-untyped-def]
            self.units += 1
            if self.units == 5:
                stopped.start()
                time.sleep(0.5)
            return super().run_together(workload, prompts, setups, purpose)

    stopped = threading.Thread(target=stop_and_start, args=(own_server, 8.0))
    with EvidenceStore.open(own_server) as evidence_store:
        session = TuningSession.of(evidence_store)
        done = tune(Stopping(keep=0.9), TestRuns.LOADS, session, TestRuns.OPTIONS, Watch())
        stopped.join()
        assert done.cost["measured_units"] > 5
        assert evidence_store.latest_policy() is not None


class TestRuns:
    LOADS = ((GREEDY, prompts(40)),)
    OPTIONS = Options(lengths=(1, 2))

    def test_a_rehearsal_copies_what_is_known(self, url: str) -> None:
        """A finished run leaves nothing to measure, on a server too; an empty one is not filled by a dry run."""
        with pytest.raises(StoreError, match="no tables yet"):
            dry_run(FakeEngine(keep=0.9), self.LOADS, url, self.OPTIONS)
        with EvidenceStore.open(url) as evidence_store:
            done = tune(FakeEngine(keep=0.9), self.LOADS, TuningSession.of(evidence_store), self.OPTIONS, Watch())
        foreseen = dry_run(FakeEngine(keep=0.9), self.LOADS, url, self.OPTIONS)
        assert foreseen.new_units == {}
        assert foreseen.known_units >= done.cost["measured_units"]
        assert ask(url, "SELECT count(*) FROM runs") == [(1,)]

    def test_the_policy_file_stays_on_this_host(self, url: str) -> None:
        """In a folder named after the server, which holds no password."""
        with EvidenceStore.open(url) as evidence_store:
            done = tune(FakeEngine(keep=0.9), self.LOADS, TuningSession.of(evidence_store), self.OPTIONS, Watch())
        server = sqlalchemy.make_url(url)
        assert done.policy_path.is_file()
        assert done.policy_path.is_relative_to(Path(os.environ["DRAFTPICK_STORE"]) / "servers")
        assert done.policy_path.parent.name.startswith(f"127.0.0.1-{server.port}-postgres-")
        assert str(server.password) not in str(done.policy_path)

    def test_the_command_line_takes_a_url(self, url: str, sound_words: list[str], tmp_path: Path) -> None:
        """`run`, `show` and `lookup` speak to the server, and print no password."""
        for words in (sound_words, ["show"], ["lookup", "--json"], ["explain"], ["run", "--dry-run", *sound_words[1:]]):
            said = call(tmp_path / "home", *words, "--store", url)
            assert said.code in DECIDED, said.stderr
            assert str(sqlalchemy.make_url(url).password) not in said.stdout + said.stderr
        assert call(tmp_path / "home", "lookup", "--json", "--store", url).document["store"].endswith("/postgres")
        assert not (tmp_path / "home" / "evidence.db").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "mysql://me:s3cret@host/base",
            "a folder, sqlite:///FILE or postgresql.psycopg://USER:PASSWORD@HOST/DATABASE is needed",
        ),
        ("postgresql+asyncpg://me:s3cret@host/base", "is needed"),
        ("postgresql+psycopg://me:s3cret@host", "it names no database"),
        ("postgresql+psycopg://me:s3cret@host:port/base", "URL cannot be read"),
        ("://s3cret", "URL cannot be read"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(text: str, wanted: str) -> None:
    """In one line, without repeating the password; no server is asked."""
    for opened in (EvidenceStore.open, EvidenceStore.open_read_only):
        with pytest.raises(StoreError, match=wanted) as caught:
            opened(text)
        assert "s3cret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_line_refuses_such_a_url(tmp_path: Path) -> None:
    """As an option and as $DRAFTPICK_STORE, for a verb that reads and for one that measures."""
    wrong = "mysql://me:s3cret@host/base"
    for words in (["show", "--store", wrong], ["lookup", "--store", wrong], ["run", "--store", wrong]):
        said = call(tmp_path, *words)
        assert_refused(said, 2, "store mysql://me:***@host/base: a folder, sqlite:///FILE or postgresql+psycopg://")
        assert "s3cret" not in said.stderr
    assert_refused(call(wrong, "show"), 2, "store mysql://me:***@host/base")  # type: ignore[arg-type]


def test_a_driver_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"me:\*\*\*@host/base: the driver is not installed: pip install"):
        EvidenceStore.open("postgresql+psycopg://me:s3cret@host/base")
