"""The first schema: models, environments, evidence, runs and policies."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _subjects()
    _traces()
    _timings()
    _runs()


def _about_target(table: str, time_name: str = "measured_at") -> list[Any]:
    return [
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("target_key", sa.String, nullable=False),
        sa.Column("environment_digest", sa.String, nullable=False),
        sa.Column(time_name, sa.String, nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.ForeignKeyConstraint(["target_key"], ["models.key"], name=f"fk_{table}_target_key"),
        sa.ForeignKeyConstraint(["environment_digest"], ["environments.digest"], name=f"fk_{table}_environment_digest"),
    ]


def _subjects() -> None:
    op.create_table(
        "models",
        sa.Column("key", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("revision", sa.String),
        sa.Column("dtype", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("num_params", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_models"),
    )
    op.create_table(
        "environments",
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("device_count", sa.Integer, nullable=False),
        sa.Column("memory_bytes", sa.Integer, nullable=False),
        sa.Column("driver", sa.String),
        sa.Column("cuda", sa.String),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("torch", sa.String, nullable=False),
        sa.Column("engine", sa.String, nullable=False),
        sa.Column("engine_version", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_environments"),
    )


def _traces() -> None:
    point = ["target_key", "sampling_digest", "prompt_digest"]
    op.create_table(
        "target_traces",
        *_about_target("target_traces"),
        sa.Column("sampling_digest", sa.String, nullable=False),
        sa.Column("prompt_digest", sa.String, nullable=False),
        sa.Column("token_ids", sa.JSON, nullable=False),
        sa.Column("target_probs", sa.JSON, nullable=False),
        sa.Column("logit_gaps", sa.JSON, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.UniqueConstraint(*point, name="uq_target_traces"),
    )
    op.create_table(
        "acceptance_traces",
        *_about_target("acceptance_traces"),
        sa.Column("sampling_digest", sa.String, nullable=False),
        sa.Column("prompt_digest", sa.String, nullable=False),
        sa.Column("draft_digest", sa.String, nullable=False),
        sa.Column("draft_name", sa.String, nullable=False),
        sa.Column("keep_probs", sa.JSON, nullable=False),
        sa.Column("confidences", sa.JSON, nullable=False),
        sa.UniqueConstraint(*point, "draft_digest", name="uq_acceptance_traces"),
    )
    op.create_table(
        "lookup_traces",
        *_about_target("lookup_traces"),
        sa.Column("sampling_digest", sa.String, nullable=False),
        sa.Column("prompt_digest", sa.String, nullable=False),
        sa.Column("draft_digest", sa.String, nullable=False),
        sa.Column("draft_name", sa.String, nullable=False),
        sa.Column("max_length", sa.Integer, nullable=False),
        sa.Column("proposed", sa.JSON, nullable=False),
        sa.Column("kept", sa.JSON, nullable=False),
        sa.UniqueConstraint(*point, "draft_digest", "max_length", name="uq_lookup_traces"),
    )


def _timings() -> None:
    op.create_table(
        "step_times",
        *_about_target("step_times"),
        sa.Column("sweep", sa.String, nullable=False),
        sa.Column("part_digest", sa.String, nullable=False),
        sa.Column("part_name", sa.String, nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("context_length", sa.Integer, nullable=False),
        sa.Column("max_length", sa.Integer, nullable=False),
        sa.Column("samples_s", sa.JSON, nullable=False),
        sa.Column("disturbed", sa.Boolean, nullable=False),
        sa.UniqueConstraint("sweep", "part_digest", name="uq_step_times"),
    )
    op.create_table(
        "samples",
        *_about_target("samples"),
        sa.Column("unit", sa.String, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("anchor_digest", sa.String, nullable=False),
        sa.Column("occasion", sa.String, nullable=False),
        sa.Column("setup_digest", sa.String, nullable=False),
        sa.Column("setup_name", sa.String, nullable=False),
        sa.Column("prompt_digest", sa.String, nullable=False),
        sa.Column("ttft_s", sa.Float, nullable=False),
        sa.Column("decode_s", sa.Float, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("rounds", sa.JSON, nullable=False),
        sa.Column("output_digest", sa.String, nullable=False),
        sa.Column("peak_memory_bytes", sa.Integer),
        sa.Column("disturbed", sa.Boolean, nullable=False),
        sa.UniqueConstraint("unit", "position", name="uq_samples"),
    )
    op.create_table(
        "infeasible",
        *_about_target("infeasible"),
        sa.Column("anchor_digest", sa.String, nullable=False),
        sa.Column("setup_digest", sa.String, nullable=False),
        sa.Column("setup", sa.JSON, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )


def _runs() -> None:
    op.create_table(
        "runs",
        *_about_target("runs", "started_at"),
        sa.Column("finished_at", sa.String),
        sa.Column("workload", sa.JSON, nullable=False),
        sa.Column("outcome", sa.JSON),
    )
    op.create_table(
        "policies",
        *_about_target("policies", "created_at"),
        sa.Column("policy", sa.Text, nullable=False),
    )
