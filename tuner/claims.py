"""What is claimed about a setup: a forecast, and a measurement against plain decoding.

Records only; how a forecast is computed or a win proven is elsewhere. Standard library only: serving code reads them.
"""

from dataclasses import dataclass

from profiles.terms import Interval, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What acceptance and step times say a setup should reach; not believed until measured."""

    setup: Setup
    tok_per_s: Interval
    speedup: Interval
    acceptance_length: float


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
    num_partings: int
    num_disturbed: int
