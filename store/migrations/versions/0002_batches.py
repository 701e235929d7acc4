"""Samples tell what the whole batch ran: shapes of its rounds, and prefills of other rows that a row waited for."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("samples", sa.Column("shapes", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("samples", sa.Column("refills", sa.Integer, nullable=False, server_default="0"))
