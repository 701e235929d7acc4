"""Brings a store's schema to the newest revision, and refuses a store that this version cannot read.

Alembic runs the numbered revisions in `versions/` in the caller's transaction, and is loaded only for that.
"""

from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, column, select

from profiles.records.errors import NewerStoreError, StoreError
from profiles.records.text import command

LOCATION = Path(__file__).parent
REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006")  # those in `versions/`, oldest first
HEAD = REVISIONS[-1]

_VERSION = sqlalchemy.table("alembic_version", column("version_num"))


def is_current(connection: Connection) -> bool:
    """Whether the store has the newest revision; False for an older or an empty one.

    Raises: NewerStoreError: its revision is unknown here. StoreError: it is the database of another program.
    """
    return _revision(connection) == HEAD


def require_current(connection: Connection) -> None:
    """Raises StoreError, as `is_current` does and for an older or empty store: who only reads cannot upgrade it."""
    revision = _revision(connection)
    if revision != HEAD:
        schema = "no tables yet" if revision is None else f"the older schema {revision}"
        raise StoreError(
            f"it has {schema}, this draftpick reads {HEAD}: `{command('show')}` on a host that may write upgrades it"
        )


def execute_script(connection: Connection, name: str) -> None:
    """Execute a SQL script of `versions/`; names in braces stand for what differs between SQLite and PostgreSQL."""
    is_sqlite = connection.dialect.name == "sqlite"
    types = {
        "id": "INTEGER NOT NULL PRIMARY KEY" if is_sqlite else "SERIAL PRIMARY KEY",
        "counted_id": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT" if is_sqlite else "SERIAL PRIMARY KEY",
        "bytes": "BLOB" if is_sqlite else "BYTEA",
        "wide": "INTEGER" if is_sqlite else "BIGINT",
        "without_rowid": " WITHOUT ROWID" if is_sqlite else "",
    }
    script = (LOCATION / "versions" / name).read_text(encoding="utf-8").format(**types)
    for statement in filter(str.strip, script.split(";\n")):
        connection.exec_driver_sql(statement)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the missing revisions up to `revision`; the caller commits."""
    import alembic.command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(LOCATION).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, revision)


def _revision(connection: Connection) -> str | None:
    """The store's revision, None: the store is empty."""
    names = sqlalchemy.inspect(connection).get_table_names()
    revision = connection.scalar(select(_VERSION.c.version_num)) if _VERSION.name in names else None
    if names and (revision is None or "target_traces" not in names):
        raise StoreError(f"it holds the table {names[0]!r} of another program: name another store")
    if revision is not None and revision not in REVISIONS:
        raise NewerStoreError(
            f"it has schema {revision}, this draftpick reads up to {HEAD}: upgrade draftpick or name another store"
        )
    return revision
