"""Brings a store's schema to the newest revision known here, and refuses a file that this version cannot read.

Alembic runs the numbered revisions in `versions/` on the caller's connection. It must not know what rows mean, nor
open or commit a transaction: the book does.
"""

from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from profiles.errors import NewerStoreError, StoreError

LOCATION = Path(__file__).parent


def is_current(connection: Connection) -> bool:
    """Whether the file has the newest revision; False for an older or an empty one.

    Raises: NewerStoreError: its revision is unknown here. StoreError: it is the file of another program.
    """
    scripts = ScriptDirectory.from_config(_config())
    names = sqlalchemy.inspect(connection).get_table_names()
    revision = MigrationContext.configure(connection).get_current_revision()
    if names and (revision is None or "target_traces" not in names):
        raise StoreError(f"it holds the table {names[0]!r} of another program: name another store")
    known = [script.revision for script in scripts.walk_revisions()]
    if revision is not None and revision not in known:
        raise NewerStoreError(
            f"it has schema {revision}, this draftpick reads up to {known[0]}: upgrade draftpick or name another store"
        )
    return revision == known[0]


def upgrade(connection: Connection) -> None:
    """Run the missing revisions; the caller commits."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(LOCATION).replace("%", "%%"))
    return config
