"""The first schema: models, environments, evidence, runs and policies."""

from alembic import op

from store.migrations import execute_script

revision = "0001"
down_revision = None


def upgrade() -> None:
    execute_script(op.get_bind(), "0001_first.sql")
