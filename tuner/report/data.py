"""What a report shows of one run, as plain records that go to JSON and back.

A run saves its report data in the store; every page is made of it, without a model or torch.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, cast

from profiles.records import codec
from profiles.records.core import Draft, Environment, Interval, Model
from profiles.records.errors import require
from profiles.records.text import map_text, printable
from tuner.policy.estimates import RoundSplit
from tuner.policy.policy import MEASURED_NAMES, Choice, rename_keys

REPORT_DATA_VERSION = 3  # 2 added what policies of version 2 did
EARLIER_NAMES = {"anchors": "points", "kept": "accepted"}  # keys of reports before 0.6
DROPPED = ("timeline", "staircases", "step_time_curves", "from_earlier", "standing")  # what earlier draftpicks showed
State = Literal["baseline", "forecast only", "raced", "pruned in the race", "not proven", "proven", "infeasible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A setup at one operating point: how far it came (`state`), why no further, and its figures.

    `draft_name` is `plain` for plain decoding, whose state is `baseline`. Rates are output tokens per second, decode
    only; `measured_*` come from the proof; `race_speedup` is a geometric mean over the race's prompts and only selects.
    """

    setup_name: str
    draft_name: str
    length: int
    state: State
    reason: str
    forecast_tok_per_s: Interval | None = None
    forecast_speedup: Interval | None = None
    measured_tok_per_s: Interval | None = None
    measured_speedup: Interval | None = None
    race_speedup: float | None = None
    acceptance_length: float | None = None
    round_split: RoundSplit | None = None

    @property
    def known_tok_per_s(self) -> Interval | None:
        return self.measured_tok_per_s or self.forecast_tok_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PointFigures:
    """One operating point: its choice, and every candidate, the best forecast first.

    `noise` is the mean log ratio of plain decoding against itself in the race; `stopped` says what ended the run early.
    """

    choice: Choice
    stopped: str | None
    noise: float | None
    num_forecast_prompts: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Of the rounds that proposed as far as `position` (from 1), the share that accepts that far."""

    position: int
    num_rounds: float
    accepted: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceCurve:
    """Acceptance by position of one draft on the prompts of one domain, at the largest length."""

    draft_name: str
    domain: str
    num_prompts: int
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """The operating points of a batch size, context and sampling, and their evidence (none if the run stopped).

    The first point covers all domains.
    """

    points: tuple[PointFigures, ...]
    curves: tuple[AcceptanceCurve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """One run: its models and machine, and its loads.

    `created` is the policy's. Raises InputError: another version, no load, or a load without an operating point.
    """

    version: int = REPORT_DATA_VERSION
    created: str
    target: Model
    drafts: tuple[Draft, ...]
    environment: Environment
    loads: tuple[LoadFigures, ...]

    def __post_init__(self) -> None:
        is_read = self.version == REPORT_DATA_VERSION
        require(is_read, f"version {self.version}: this draftpick knows {REPORT_DATA_VERSION}")
        complete = bool(self.loads) and all(load.points for load in self.loads)
        require(complete, "report data needs a load, and every load an operating point")

    @property
    def points(self) -> tuple[PointFigures, ...]:
        """Of all loads, in their order; the first is the headline."""
        return tuple(point for load in self.loads for point in load.points)

    def to_json(self) -> dict[str, Any]:
        """Lists, objects, strings, numbers and None only. Raises InputError when a number is not finite."""
        return cast(dict[str, Any], json.loads(codec.to_json(self)))

    @classmethod
    def from_json(cls, raw: object) -> "ReportData":
        """The report data that `to_json` wrote. Raises InputError, naming field, value and what is allowed."""
        raw = rename_keys(raw, MEASURED_NAMES | EARLIER_NAMES | dict.fromkeys(DROPPED))
        return codec.from_builtins(cls, map_text(raw, printable), "report data", newest_version=REPORT_DATA_VERSION)
