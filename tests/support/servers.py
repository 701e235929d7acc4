"""A PostgreSQL server for tests that want one, and raw SQL against a store of either kind.

`.ci/postgres COMMAND` starts a server and names it to COMMAND; without one these tests are skipped with that reason.
"""

import json
import os
import sqlite3
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from store.database import Location, is_url
from store.evidence_store import EvidenceStore
from tests import ROOT

VARIABLE = "DRAFTPICK_TEST_POSTGRES"
KINDS = ("sqlite", "postgresql")


def server() -> sqlalchemy.URL:
    """The database in which tests may make schemas, roles and databases; the test is skipped where there is none."""
    text = os.environ.get(VARIABLE)
    if not text:
        pytest.skip(f"no PostgreSQL server: {VARIABLE} is not set; `.ci/postgres COMMAND` starts one")
    return sqlalchemy.make_url(text)


def run_sql(url: str | sqlalchemy.URL, query: str) -> list[Any]:
    """What the server says to one statement, with its own driver alone."""
    said = sqlalchemy.make_url(url).translate_connect_args(username="user", database="dbname")
    with psycopg.connect(**said, **sqlalchemy.make_url(url).query, autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description is not None else []


@contextmanager
def schema() -> Iterator[str]:
    """The URL of a schema of its own, dropped afterwards with that of the studies."""
    url, name = server(), f"t_{uuid.uuid4().hex[:12]}"
    run_sql(url, f"CREATE SCHEMA {name}")
    try:
        yield url.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
    finally:
        run_sql(url, f"DROP SCHEMA IF EXISTS {name}, {name}_optuna CASCADE")


@contextmanager
def another() -> Iterator[str]:
    """The URL of a second server, gone afterwards: for a test that stops its server while others use theirs."""
    server()
    command = [str(ROOT / ".ci/postgres"), "sh", "-c", f'echo "${VARIABLE}"; exec cat']
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as started:
        assert started.stdout
        yield started.stdout.readline().strip()


def ask(location: Location | EvidenceStore, query: str) -> list[Any]:
    """The rows of one statement, committed, on a connection of its own; JSON as its values on either kind."""
    if isinstance(location, EvidenceStore):
        database = location.database
        location = database.path or database.engine.url.render_as_string(hide_password=False)
    if is_url(location):
        return run_sql(str(location), query)
    with closing(sqlite3.connect(Path(location))) as connection:
        rows = connection.execute(query).fetchall()
        connection.commit()
    return rows


def parsed(value: Any) -> Any:
    """A JSON column as `ask` gives it: SQLite's is text."""
    return json.loads(value) if isinstance(value, str) else value
