"""What a report shows of one run, as plain records that go to JSON and back.

A run keeps its dossier in the store, so that every page and picture is drawn from it alone: without a model, without
torch. How the figures came about it must not know. Standard library only.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from profiles.records import codec
from profiles.records.core import Draft, Environment, Interval, Model
from profiles.records.errors import InputError
from profiles.records.text import printable_values
from tuner.policy.estimates import RoundSplit
from tuner.policy.policy import MEASURED_NAMES, Choice, rename_keys

REPORT_DATA_VERSION = 3  # 2 added what policies of version 2 did; data of version 3 may hold a timeline
STATES = ("baseline", "forecast only", "raced", "pruned in the race", "not proven", "proven", "infeasible")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A setup at one anchor: how far it came (`state`, one of STATES), why no further, and what is known of it.

    `draft_name` is `plain` for plain decoding, whose state is `baseline`. Rates are output tokens per second, decode
    only; `measured_*` come from the proof; `race_speedup` is a geometric mean over the race's prompts and only selects.
    """

    setup_name: str
    draft_name: str
    length: int
    state: str
    reason: str
    forecast_tok_per_s: Interval | None = None
    forecast_speedup: Interval | None = None
    measured_tok_per_s: Interval | None = None
    measured_speedup: Interval | None = None
    race_speedup: float | None = None
    acceptance_length: float | None = None
    round_split: RoundSplit | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise InputError(f"state {self.state!r}: allowed are {', '.join(STATES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorFigures:
    """One anchor: what the policy says there, and every candidate, the best forecast first.

    `from_earlier`: this run ended before it could decide, and the policy keeps an earlier run's choice. `noise` is the
    mean log ratio of plain decoding against itself in the race; `stopped` says what ended the run early.
    """

    choice: Choice
    from_earlier: bool
    stopped: str | None
    noise: float | None
    num_forecast_prompts: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Of the rounds that proposed as far as `position` (from 1), the share that kept that far."""

    position: int
    num_rounds: float
    kept: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceCurve:
    """Acceptance by position of one draft on the prompts of one domain, at the largest length."""

    draft_name: str
    domain: str
    num_prompts: int
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stair:
    """Seconds of one forward at one width: the median sample, and the 10 and 90 % quantiles of the samples."""

    width: int
    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """Step times of one part; `kind` is `target` or the draft's kind (of a look-up, width is the tokens asked for)."""

    name: str
    kind: str
    disturbed: bool
    stairs: tuple[Stair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """All anchors that share a batch, a context and a sampling law, and the evidence under them (none if it stopped).

    The first anchor is the one over all domains.
    """

    anchors: tuple[AnchorFigures, ...]
    curves: tuple[AcceptanceCurve, ...]
    staircases: tuple[Staircase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """One run: its models and machine, its loads, and the policy's choices of earlier runs that it left standing.

    `created` is the policy's. Raises InputError: another version, no load, or a load without an anchor.
    """

    version: int = REPORT_DATA_VERSION
    created: str
    target: Model
    drafts: tuple[Draft, ...]
    environment: Environment
    loads: tuple[LoadFigures, ...]
    standing: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if self.version != REPORT_DATA_VERSION:
            raise InputError(f"version {self.version}: this draftpick knows {REPORT_DATA_VERSION}")
        if not self.loads or not all(load.anchors for load in self.loads):
            raise InputError("a dossier needs a load, and every load an anchor")

    @property
    def anchors(self) -> tuple[AnchorFigures, ...]:
        """Of all loads, in their order; the first is the headline."""
        return tuple(anchor for load in self.loads for anchor in load.anchors)

    def to_json(self) -> dict[str, Any]:
        """Lists, objects, strings, numbers and None only. Raises InputError when a number is not finite."""
        return cast(dict[str, Any], json.loads(codec.to_json(self)))

    @classmethod
    def from_json(cls, raw: object) -> "ReportData":
        """The dossier that `to_json` made. Raises InputError, naming field, value and what is allowed."""
        if isinstance(raw, dict):
            raw = {name: value for name, value in raw.items() if name != "timeline"}  # earlier draftpicks drew one
        raw = rename_keys(raw, MEASURED_NAMES)  # of runs before policies of version 4
        return codec.from_builtins(cls, printable_values(raw), "report data", newest_version=REPORT_DATA_VERSION)
