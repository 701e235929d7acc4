"""What is known about a setup: a forecast, and a measurement against plain decoding."""

from dataclasses import dataclass
from typing import Literal

from profiles.records.core import Interval, Setup

Objective = Literal["tpot", "throughput"]  # what is compared: seconds of decoding, or of whole requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a setup should reach by acceptance and step times.

    `acceptance_length` is None for a draft that was only run on an engine that does not count rounds.
    """

    setup: Setup
    tok_per_s: Interval
    speedup: Interval
    acceptance_length: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A setup against plain decoding in paired real runs; `speedup` is decode only, `end_to_end` with prefill.

    Interval and p-value hold for all looks at the growing proof. `num_forecast_prompts`: prompts whose forecasts made
    the speed-up more precise. `detectable_speedup`: what the proof would have shown 80 % of the time. None: not known.
    """

    setup: Setup
    speedup: Interval
    end_to_end: Interval
    plain_tok_per_s: Interval
    tok_per_s: Interval
    p_value: float
    num_prompts: int
    num_divergences: int
    num_disturbed: int
    num_forecast_prompts: int | None = None
    detectable_speedup: float | None = None

    def compared(self, objective: Objective) -> Interval:
        """The speed-up that the objective compares."""
        return self.speedup if objective == "tpot" else self.end_to_end


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSplit:
    """Where the seconds of a mean round go, by forecast: drafting, verifying, and overhead.

    `draft_s` is None where an engine times whole rounds: `verify_s` then includes drafting.
    """

    draft_s: float | None
    verify_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """Of the whole round; the overhead is below 0 where steps in a row are faster than alone."""
        return (self.draft_s or 0.0) + self.verify_s + self.overhead_s
