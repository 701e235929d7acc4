"""Machines tell the traits that a look-up on another machine compares; policies are found without reading them all."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

WIDE = (("models", "num_params"), ("environments", "memory_bytes"), ("samples", "peak_memory_bytes"))


def upgrade() -> None:
    op.add_column("environments", sa.Column("compute_capability", sa.String))
    op.add_column(
        "environments", sa.Column("memory_bandwidth_bytes_s", sa.Integer().with_variant(sa.BigInteger, "postgresql"))
    )
    op.create_index("ix_policies_about", "policies", ["target_key", "environment_digest", "created_at"])
    if op.get_bind().dialect.name != "sqlite":  # SQLite's whole numbers have 64 bits whatever they are called
        for table, column in WIDE:
            op.alter_column(table, column, type_=sa.BigInteger)
