"""Machines tell how a serving engine was started."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("environments", sa.Column("engine_options", sa.String))
