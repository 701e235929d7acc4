"""The store's tables, and the two small functions per record that turn it into a row and back.

A row is a record's plain form beside the digests it is found by; arrays are JSON columns, times
are UTC text that sorts. Names of drafts and setups are stored for people who read the file, never to find a row.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from profiles.records.codec import (
    acceptance_trace_from,
    lookup_trace_from,
    plain,
    sample_from,
    step_times_from,
    target_trace_from,
)
from profiles.records.core import Environment, Model
from profiles.records.evidence import AcceptanceTrace, Infeasible, LookupTrace, Sample, StepTimes, TargetTrace

Row = Mapping[str, Any]
WIDE = Integer().with_variant(BigInteger, "postgresql")  # SQLite's whole numbers have 64 bits under either name

metadata = MetaData(
    naming_convention={
        "uq": "uq_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def time_name(table: str) -> str:
    """The column of a table about a target that tells when a row was made."""
    return {"runs": "started_at", "policies": "created_at"}.get(table, "measured_at")


def _about_target(table: str) -> list[Column[Any]]:
    return [
        Column("id", Integer, primary_key=True),
        Column("target_key", String, ForeignKey("models.key"), nullable=False),
        Column("environment_digest", String, ForeignKey("environments.digest"), nullable=False),
        Column(time_name(table), String, nullable=False),
    ]


models = Table(
    "models",
    metadata,
    Column("key", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("revision", String),
    Column("dtype", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("num_params", WIDE, nullable=False),
)

environments = Table(
    "environments",
    metadata,
    Column("digest", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("device_count", Integer, nullable=False),
    Column("memory_bytes", WIDE, nullable=False),
    Column("driver", String),
    Column("cuda", String),
    Column("threads", Integer, nullable=False),
    Column("torch", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("engine_version", String, nullable=False),
    Column("compute_capability", String),
    Column("memory_bandwidth_bytes_s", WIDE),
    Column("engine_options", String),
)

target_traces = Table(
    "target_traces",
    metadata,
    *_about_target("target_traces"),
    Column("sampling_digest", String, nullable=False),
    Column("prompt_digest", String, nullable=False),
    Column("token_ids", JSON, nullable=False),
    Column("target_probs", JSON, nullable=False),
    Column("logit_gaps", JSON, nullable=False),
    Column("ended", Boolean, nullable=False),
    UniqueConstraint("target_key", "sampling_digest", "prompt_digest"),
)

acceptance_traces = Table(
    "acceptance_traces",
    metadata,
    *_about_target("acceptance_traces"),
    Column("sampling_digest", String, nullable=False),
    Column("prompt_digest", String, nullable=False),
    Column("draft_digest", String, nullable=False),
    Column("draft_name", String, nullable=False),
    Column("keep_probs", JSON, nullable=False),
    Column("confidences", JSON, nullable=False),
    UniqueConstraint("target_key", "sampling_digest", "prompt_digest", "draft_digest"),
)

lookup_traces = Table(
    "lookup_traces",
    metadata,
    *_about_target("lookup_traces"),
    Column("sampling_digest", String, nullable=False),
    Column("prompt_digest", String, nullable=False),
    Column("draft_digest", String, nullable=False),
    Column("draft_name", String, nullable=False),
    Column("max_length", Integer, nullable=False),
    Column("proposed", JSON, nullable=False),
    Column("kept", JSON, nullable=False),
    UniqueConstraint("target_key", "sampling_digest", "prompt_digest", "draft_digest", "max_length"),
)

# No constraint on the anchor: a sweep may be measured again, and the newest answers. An early-exit or n-gram draft's
# part digest says nothing about the target, so a part is only ever read together with its sweep.
step_times = Table(
    "step_times",
    metadata,
    *_about_target("step_times"),
    Column("sweep", String, nullable=False),
    Column("part_digest", String, nullable=False),
    Column("part_name", String, nullable=False),
    Column("batch_size", Integer, nullable=False),
    Column("context_length", Integer, nullable=False),
    Column("max_length", Integer, nullable=False),
    Column("samples_s", JSON, nullable=False),
    Column("disturbed", Boolean, nullable=False),
    UniqueConstraint("sweep", "part_digest"),
)

# `unit` is the digest of the whole key: target, environment, anchor, prompts and setups in order, occasion.
samples = Table(
    "samples",
    metadata,
    *_about_target("samples"),
    Column("unit", String, nullable=False),
    Column("position", Integer, nullable=False),
    Column("anchor_digest", String, nullable=False),
    Column("occasion", String, nullable=False),
    Column("setup_digest", String, nullable=False),
    Column("setup_name", String, nullable=False),
    Column("prompt_digest", String, nullable=False),
    Column("ttft_s", Float, nullable=False),
    Column("decode_s", Float, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("rounds", JSON, nullable=False),
    Column("shapes", JSON, nullable=False, server_default="[]"),
    Column("refills", Integer, nullable=False, server_default="0"),
    Column("output_digest", String, nullable=False),
    Column("peak_memory_bytes", WIDE),
    Column("disturbed", Boolean, nullable=False),
    UniqueConstraint("unit", "position"),
)

# No unique constraint: a failure never answers for a measurement, so the same one may happen again.
infeasible = Table(
    "infeasible",
    metadata,
    *_about_target("infeasible"),
    Column("anchor_digest", String, nullable=False),
    Column("setup_digest", String, nullable=False),
    Column("setup", JSON, nullable=False),
    Column("reason", String, nullable=False),
    Column("detail", String, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    *_about_target("runs"),
    Column("finished_at", String),
    Column("workload", JSON, nullable=False),
    Column("outcome", JSON(none_as_null=True)),
)

policies = Table(
    "policies",
    metadata,
    *_about_target("policies"),
    Column("policy", Text, nullable=False),
    Index("ix_policies_about", "target_key", "environment_digest", "created_at"),
)

ABOUT_TARGETS = (target_traces, acceptance_traces, lookup_traces, step_times, samples, infeasible, runs, policies)
LABELS = frozenset({"draft_name", "part_name", "setup_name"})
_COLUMNS = {"component_digest": "part_digest", "accept_probs": "keep_probs", "accepted": "kept"}  # of other names


def _fields(record: type[Any], row: Row) -> dict[str, Any]:
    """The columns of `row` that are fields of `record`."""
    return {item.name: row[column_name(item.name)] for item in fields(record)}


def column_name(field: str) -> str:
    """The column that holds a record's field."""
    return _COLUMNS.get(field, field)


def columns_from(record: object) -> dict[str, Any]:
    """A record's plain form by column name."""
    return {column_name(name): value for name, value in plain(record).items()}


# Towards a row, a trace, a staircase and a sample are their plain form; the others add the digest they are found by.


def model_row(model: Model) -> dict[str, Any]:
    return {"key": model.run_digest, **plain(model)}


def environment_row(environment: Environment) -> dict[str, Any]:
    return {"digest": environment.digest, **plain(environment)}


def target_trace_record(row: Row) -> TargetTrace:
    return target_trace_from(_fields(TargetTrace, row))


def acceptance_record(row: Row) -> AcceptanceTrace:
    return acceptance_trace_from(_fields(AcceptanceTrace, row))


def lookup_record(row: Row) -> LookupTrace:
    return lookup_trace_from(_fields(LookupTrace, row))


def sweep_record(row: Row) -> tuple[str, int, StepTimes]:
    """The sweep a staircase belongs to, the longest speculation length it was asked for, and the staircase."""
    return row["sweep"], row["max_length"], step_times_from(_fields(StepTimes, row))


def sample_record(row: Row) -> Sample:
    return sample_from(_fields(Sample, row))


def infeasible_row(found: Infeasible) -> dict[str, Any]:
    return {"setup_digest": found.setup.digest, **plain(found)}
