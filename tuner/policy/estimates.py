"""What is claimed about a setup: a forecast, and a measurement against plain decoding.

Records only; how a forecast is computed or a win proven is elsewhere. Standard library only: serving code reads them.
"""

from dataclasses import dataclass

from profiles.records.core import Interval, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What acceptance and step times say a setup should reach; not believed until measured.

    `acceptance_length` is None where an engine that was only run does not count its rounds.
    """

    setup: Setup
    tok_per_s: Interval
    speedup: Interval
    acceptance_length: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A setup against plain decoding in paired real runs; `speedup` is decode only, `end_to_end` with prefill."""

    setup: Setup
    speedup: Interval
    end_to_end: Interval
    plain_tok_per_s: Interval
    tok_per_s: Interval
    p_value: float
    num_prompts: int
    num_divergences: int
    num_disturbed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSplit:
    """Where the mean round's seconds go, by forecast: the draft's steps, the target's check, and the rest.

    `draft_s` is None where an engine times whole rounds: `verify_s` is then of drafting and check together.
    """

    draft_s: float | None
    verify_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """Of the whole round; the overhead may be below 0, where steps in a row are faster than alone."""
        return (self.draft_s or 0.0) + self.verify_s + self.overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a candidate stands while its anchor is under way; the intervals are speed-ups over plain decoding.

    `state` is a word or two for people: `forecast`, `racing`, `pruned`. Nothing is decided by it.
    """

    domain: str
    setup_name: str
    forecast: Interval | None
    measured: Interval | None
    state: str
