"""The store's tables, and the functions that turn each record into rows and back.

Evidence is found by digests; names, domains and batch sizes are stored beside them for people and for the views of
revision 0006. Times are UTC text. Rows are ordered by their ids, never by their times.
"""

import json
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from statistics import median
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, String, Table, UniqueConstraint

from profiles.records.codec import from_builtins, to_builtins
from profiles.records.core import PLAIN, Environment, Model, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import (
    AcceptanceTrace,
    LookupTrace,
    RoundCount,
    Sample,
    StepShape,
    StepTimes,
    TargetTrace,
)

Row = Mapping[Any, Any]  # column names to values; a RowMapping of SQLAlchemy is one
Values = dict[str, Any]
Record = TypeVar("Record")

TIMED_COSTS = ("measured_seconds", "grid_seconds_estimate", "starting_seconds")
COUNTED_COSTS = ("measured_units", "reused_units", "engine_starts")
WIDE = Integer().with_variant(BigInteger, "postgresql")  # an INTEGER of SQLite has 64 bits anyway


class Numbers(sa.TypeDecorator[tuple[Any, ...]]):
    """A tuple of ints or of floats as one byte that names the type (as `array` does) and little-endian values.

    The smallest type that holds all values exactly is taken: most probabilities are float32, greedy ones 0 or 1.
    """

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, kind: type[int] | type[float]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: tuple[Any, ...] | None, _: sa.Dialect) -> bytes | None:
        """Raises ValueError: a number that is not finite."""
        if value is None:
            return None
        if not all(map(math.isfinite, value)):
            raise ValueError("numbers that are not finite cannot be stored")
        is_binary = all(number in (0, 1) for number in value)
        numbers = [int(number) for number in value] if is_binary else value
        for code in "bhiqfd" if self.kind is int or is_binary else "fd":
            try:
                packed = array(code, numbers)
            except (OverflowError, TypeError):
                continue
            if packed.tolist() == list(value):
                if sys.byteorder == "big":
                    packed.byteswap()
                return code.encode() + packed.tobytes()
        raise ValueError(f"{value[:3]} cannot be stored as an array of {self.kind.__name__}")

    def process_result_value(self, value: Any, _: sa.Dialect) -> tuple[Any, ...] | None:
        """Raises ValueError: not what `process_bind_param` returns."""
        if value is None:
            return None
        if not isinstance(value, bytes) or value[:1] not in (b"b", b"h", b"i", b"q", b"f", b"d"):
            raise ValueError(f"{str(value)[:20]!r} is not an array of numbers")
        numbers = array(value[:1].decode())
        numbers.frombytes(value[1:])
        if sys.byteorder == "big":
            numbers.byteswap()
        return tuple(map(self.kind, numbers))


NAMES = {"uq": "uq_%(table_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s"}
metadata = sa.MetaData(naming_convention=NAMES)


def time_name(table: str) -> str:
    """The column that holds when a row about a target was made."""
    return {"runs": "started_at", "policies": "created_at"}.get(table, "measured_at")


def _columns(kind: Any, *names: str, null: bool = False) -> list[Column[Any]]:
    return [Column(name, kind, nullable=null) for name in names]


def _id() -> Column[Any]:
    return Column("id", Integer, primary_key=True)


def _link(name: str, target: str, *, null: bool = False, ondelete: str | None = None) -> Column[Any]:
    return Column(name, ForeignKey(target, ondelete=ondelete), nullable=null)


def _about_target(table: str) -> list[Column[Any]]:
    links = [_link("target_key", "models.key"), _link("environment_digest", "environments.digest")]
    return [_id(), *links, *_columns(String, time_name(table))]


def _run_id() -> Column[Any]:
    return _link("run_id", "runs.id", null=True, ondelete="SET NULL")


def _trace_table(name: str, *columns: Column[Any], key: tuple[str, ...] = ()) -> Table:
    """Traces, of which a prompt has one for each target, sampling and `key`."""
    return Table(
        name,
        metadata,
        *_about_target(name),
        *_columns(String, "sampling_digest", "prompt_digest", *(("draft_digest", "draft_name") if key else ())),
        *_columns(Float, "temperature", null=True),
        *columns,
        UniqueConstraint("target_key", "sampling_digest", "prompt_digest", *key),
        Index(f"ix_{name}_environment", "environment_digest", "target_key", "measured_at"),
    )


models = Table(
    "models",
    metadata,
    Column("key", String, primary_key=True),
    *_columns(String, "name"),
    *_columns(String, "revision", null=True),
    *_columns(String, "dtype", "digest"),
    *_columns(WIDE, "num_params"),
    *_columns(Integer, "vocab_size", null=True),
    *_columns(String, "stored_type", null=True),
)

environments = Table(
    "environments",
    metadata,
    Column("digest", String, primary_key=True),
    *_columns(String, "device"),
    *_columns(Integer, "device_count"),
    *_columns(WIDE, "memory_bytes"),
    *_columns(String, "driver", "cuda", null=True),
    *_columns(Integer, "threads"),
    *_columns(String, "torch", "engine", "engine_version"),
    *_columns(String, "compute_capability", null=True),
    *_columns(WIDE, "memory_bandwidth_bytes_s", null=True),
    *_columns(String, "engine_options", null=True),
)

# What is null in these three was not known to an older draftpick; it is filled in when it is seen again.
prompts = Table(
    "prompts",
    metadata,
    _id(),
    *_columns(String, "digest"),
    *_columns(String, "domain", null=True),
    *_columns(Integer, "num_tokens", null=True),
    UniqueConstraint("digest"),
)

# `digest` is that of `timing_digest`, which identifies timed runs beside prompt and setup, and of the context length.
workloads = Table(
    "workloads",
    metadata,
    _id(),
    *_columns(String, "digest", "timing_digest"),
    *_columns(String, "sampling_digest", null=True),
    *_columns(Integer, "batch_size", "context_length", "max_new_tokens", null=True),
    *_columns(Float, "temperature", "top_p", null=True),
    *_columns(Integer, "top_k", null=True),
    *_columns(WIDE, "seed", null=True),
    UniqueConstraint("digest"),
)

setups = Table(
    "setups",
    metadata,
    _id(),
    *_columns(String, "digest", "name"),
    *_columns(String, "draft", "draft_kind", null=True),
    *_columns(Integer, "k"),
    UniqueConstraint("digest"),
)

runs = Table(
    "runs",
    metadata,
    *_about_target("runs"),
    *_columns(String, "finished_at", null=True),
    *_columns(Float, *TIMED_COSTS, null=True),
    *_columns(Integer, *COUNTED_COSTS, null=True),
    *_columns(sa.JSON, "workload"),
    *_columns(sa.JSON(none_as_null=True), "outcome", null=True),
    Index("ix_runs_target", "target_key", "environment_digest"),
    sqlite_autoincrement=True,
)

target_traces = _trace_table(
    "target_traces",
    *_columns(Numbers(int), "token_ids"),
    *_columns(Numbers(float), "target_probs", "logit_gaps"),
    *_columns(Boolean, "ended"),
)

# `num_proposed`: tokens that the draft was asked about or proposed; `num_accepted`: how many of them are accepted.
acceptance_traces = _trace_table(
    "acceptance_traces",
    *_columns(Numbers(float), "accept_probs", "confidences"),
    *_columns(Integer, "num_proposed"),
    *_columns(Float, "num_accepted"),
    key=("draft_digest",),
)

lookup_traces = _trace_table(
    "lookup_traces",
    *_columns(Integer, "max_length"),
    *_columns(Numbers(int), "proposed", "accepted"),
    *_columns(Integer, "num_proposed"),
    *_columns(Float, "num_accepted"),
    key=("draft_digest", "max_length"),
)

TRACES: dict[type[Any], Table] = {
    TargetTrace: target_traces,
    AcceptanceTrace: acceptance_traces,
    LookupTrace: lookup_traces,
}

# No constraint on the operating point: it may be measured again, and the newest sweep answers. The digest of an
# early-exit or n-gram draft says nothing about the target, so step times are only ever read together with their sweep.
sweeps = Table(
    "sweeps",
    metadata,
    *_about_target("sweeps"),
    _run_id(),
    *_columns(String, "digest"),
    *_columns(Integer, "batch_size", "context_length", "max_length"),
    *_columns(String, "sampling", null=True),  # of the tokens that were chosen; null is greedy
    UniqueConstraint("digest"),
    Index("ix_sweeps_target", "target_key", "environment_digest", "batch_size", "context_length"),
)

step_times = Table(
    "step_times",
    metadata,
    Column("sweep_id", ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True),
    Column("component_digest", String, primary_key=True),
    Column("width", Integer, primary_key=True, autoincrement=False),
    *_columns(String, "component"),
    *_columns(Numbers(float), "samples_s"),
    *_columns(Float, "median_s"),
    *_columns(Boolean, "disturbed"),
    sqlite_with_rowid=False,
)

# `digest` is that of the whole key: target, environment, sampling, batch size, prompts and setups in order, purpose.
units = Table(
    "units",
    metadata,
    *_about_target("units"),
    _run_id(),
    _link("workload_id", "workloads.id"),
    *_columns(String, "digest", "purpose"),
    UniqueConstraint("digest"),
    Index("ix_units_target", "target_key", "environment_digest", "measured_at"),
)

samples = Table(
    "samples",
    metadata,
    Column("unit_id", ForeignKey("units.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    _link("setup_id", "setups.id"),
    _link("prompt_id", "prompts.id"),
    *_columns(Float, "ttft_s", "decode_s"),
    *_columns(Integer, "output_tokens"),
    *_columns(sa.JSON, "rounds", "shapes"),
    *_columns(Integer, "refills"),
    *_columns(String, "output_digest"),
    *_columns(Boolean, "disturbed"),
    sqlite_with_rowid=False,
)

# No unique constraint: a failure never answers for a measurement, so the same one may happen again.
infeasible = Table(
    "infeasible",
    metadata,
    *_about_target("infeasible"),
    _run_id(),
    _link("workload_id", "workloads.id"),
    _link("setup_id", "setups.id"),
    *_columns(sa.JSON, "setup"),
    *_columns(String, "reason", "detail"),
    Index("ix_infeasible_target", "target_key", "environment_digest"),
)

# `generation` counts the policies of a target on a machine: a bundle may bring an older one later.
policies = Table(
    "policies",
    metadata,
    *_about_target("policies"),
    *_columns(Integer, "generation"),
    *_columns(sa.Text, "policy"),
    Index("ix_policies_target", "target_key", "environment_digest", "generation"),
    sqlite_autoincrement=True,
)

_newer = policies.alias("newer")
IS_NEWEST_POLICY = ~sa.exists().where(  # of its target and machine
    _newer.c.target_key == policies.c.target_key,
    _newer.c.environment_digest == policies.c.environment_digest,
    sa.tuple_(_newer.c.generation, _newer.c.id) > sa.tuple_(policies.c.generation, policies.c.id),
)

# The policy's choices in its own order. `basis` says what speedup, low, high and tok_per_s are: measured or forecast.
choices = Table(
    "choices",
    metadata,
    Column("policy_id", ForeignKey("policies.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    *_columns(Integer, "batch_size", "context_length"),
    *_columns(String, "domain"),
    *_columns(Float, "temperature", "top_p"),
    *_columns(Integer, "top_k"),
    *_columns(String, "setup"),
    *_columns(String, "draft", "draft_kind", null=True),
    *_columns(Integer, "k"),
    *_columns(String, "basis", null=True),
    *_columns(Float, "speedup", "low", "high", "end_to_end", "tok_per_s", "plain_tok_per_s", null=True),
    *_columns(Boolean, "proven"),
    *_columns(String, "reason"),
    sqlite_with_rowid=False,
)

ABOUT_TARGETS = (target_traces, acceptance_traces, lookup_traces, sweeps, units, infeasible, runs, policies)


def row_of(record: Any) -> Values:
    """A record's fields as columns."""
    return {item.name: getattr(record, item.name) for item in fields(record)}


def from_row(record: Callable[..., Record], row: Row) -> Record:
    """A record from the columns that are called as its fields, where the row has them."""
    return record(**{item.name: row[item.name] for item in fields(record) if item.name in row})  # type: ignore[arg-type]


# --- records to rows: without ids, times and what the row is about ---


def model_row(model: Model) -> Values:
    return {"key": model.run_digest, **row_of(model)}


def environment_row(environment: Environment) -> Values:
    return {"digest": environment.digest, **row_of(environment)}


def prompt_row(prompt: Prompt) -> Values:
    return {"digest": prompt.digest, "domain": prompt.domain, "num_tokens": len(prompt.token_ids)}


def workload_row(workload: Workload) -> Values:
    names = ("batch_size", "context_length", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {
        "digest": digest_of([workload.timing_digest, workload.context_length]),
        "timing_digest": workload.timing_digest,
        "sampling_digest": workload.sampling_digest,
        **{name: getattr(workload, name) for name in names},
    }


def setup_row(setup: Setup) -> Values:
    draft, kind = (setup.draft.name, setup.draft.kind) if setup.draft else (None, None)
    return {"digest": setup.digest, "name": setup.name, "draft": draft, "draft_kind": kind, "k": setup.length}


def trace_row(trace: TargetTrace | AcceptanceTrace | LookupTrace) -> Values:
    row = row_of(trace)
    if isinstance(trace, LookupTrace):
        row |= {"num_proposed": sum(trace.proposed), "num_accepted": float(sum(trace.accepted))}
    elif isinstance(trace, AcceptanceTrace):  # its first token comes from the prefill
        row |= {"num_proposed": len(trace.accept_probs) - 1, "num_accepted": math.fsum(trace.accept_probs[1:])}
    return row


def step_times_rows(sweep_id: int, times: StepTimes, component: str) -> Iterator[Values]:
    """One row for each width; the sweep has batch size and context length."""
    about = {"sweep_id": sweep_id, "component_digest": times.component_digest, "component": component}
    for width, seconds in times.samples_s.items():
        measured = {"samples_s": seconds, "median_s": median(seconds), "disturbed": times.disturbed}
        yield {**about, "width": width, **measured}


def sample_row(sample: Sample) -> Values:
    """Without the ids of unit, setup and prompt."""
    names = ("ttft_s", "decode_s", "output_tokens", "refills", "output_digest", "disturbed")
    counts = {"rounds": to_builtins(sample.rounds), "shapes": to_builtins(sample.shapes)}
    return {**{name: getattr(sample, name) for name in names}, **counts}


def run_costs(outcome: object) -> Values:
    """The costs in a run's outcome as columns."""
    costs = outcome.get("cost") if isinstance(outcome, dict) else None
    return {name: costs.get(name) if isinstance(costs, dict) else None for name in (*TIMED_COSTS, *COUNTED_COSTS)}


def choice_rows(policy_id: int, text: str) -> list[Values]:
    """The choices of a policy's JSON; none of a text that is no policy."""
    try:
        choices = [_choice_row(choice) for choice in json.loads(text)["choices"]]
    except (LookupError, TypeError, ValueError, RecursionError):
        return []
    return [{"policy_id": policy_id, "position": position, **choice} for position, choice in enumerate(choices)]


def _choice_row(choice: Row) -> Values:
    setup, measured = from_builtins(Setup, choice["setup"], "setup"), choice["measured"] or {}
    # beside plain decoding stands what failed to beat it
    bases = [name for name in ("measured", "forecast") if (choice[name] or {}).get("setup") == choice["setup"]]
    figures = choice[bases[0]] if bases else {}
    speedup = figures.get("speedup") or {"estimate": 1.0 if setup == PLAIN else None}
    rates = {
        "end_to_end": figures.get("end_to_end"),
        "tok_per_s": measured.get("plain_tok_per_s") if setup == PLAIN else figures.get("tok_per_s"),
        "plain_tok_per_s": measured.get("plain_tok_per_s"),
    }
    return {
        **{name: choice[name] for name in ("batch_size", "context_length", "domain", "temperature", "top_p", "top_k")},
        "setup": setup.name,
        **{name: value for name, value in setup_row(setup).items() if name in ("draft", "draft_kind", "k")},
        "basis": bases[0] if bases else None,
        "speedup": speedup["estimate"],
        "low": speedup.get("low"),
        "high": speedup.get("high"),
        **{name: None if rate is None else rate["estimate"] for name, rate in rates.items()},
        "proven": choice["proven"],
        "reason": choice["reason"],
    }


# --- rows to records, where `from_row` does not do ---


def step_times_records(rows: Iterable[Row]) -> dict[str, StepTimes]:
    """The step times of one sweep by component digest, from rows of `step_times` joined with `sweeps`."""
    components: dict[str, list[Row]] = {}
    for row in rows:
        components.setdefault(row["component_digest"], []).append(row)
    return {
        digest: StepTimes(
            component_digest=digest,
            batch_size=widths[0]["batch_size"],
            context_length=widths[0]["context_length"],
            samples_s={row["width"]: row["samples_s"] for row in widths},
            disturbed=widths[0]["disturbed"],
        )
        for digest, widths in components.items()
    }


def sample_record(row: Row) -> Sample:
    """From a row of `samples` with the digests of setup and prompt as `setup_digest` and `prompt_digest`."""
    rounds = {RoundCount(proposed, accepted): count for proposed, accepted, count in row["rounds"]}
    shapes = {StepShape(*shape): count for *shape, count in row["shapes"]}
    return from_row(Sample, {**row, "rounds": rounds, "shapes": shapes})
