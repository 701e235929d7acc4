"""What "best" means: a conservative score of a forecast, and which of several near-equal setups is taken.

Plain decoding wins ties against drafting because its score is exactly 1; among drafting setups within 1.5 % the one
without extra weights is taken, then the shorter. Knows nothing of how forecasts or measurements came about.
"""

from collections.abc import Mapping, Sequence

from profiles.records.core import PLAIN, Draft, Setup
from tuner.policy.estimates import Forecast

TIE = 0.015


MIN_SPEEDUP = 1.0 + TIE


def score(forecast: Forecast) -> float:
    """The low end of the forecast speed-up: a wide interval must not win by luck. Plain decoding scores 1."""
    return forecast.speedup.low if forecast.setup.draft is not None else 1.0


def finalists(forecasts: Sequence[Forecast], count: int) -> tuple[Setup, ...]:
    """At most `count` drafting setups worth racing, best first: their interval reaches the best score and over 1."""
    drafting = [forecast for forecast in forecasts if forecast.setup.draft is not None]
    ordered = sorted(drafting, key=lambda forecast: -forecast.speedup.estimate)
    best = max((score(forecast) for forecast in drafting), default=0.0)
    hopeful = [f for f in ordered if f.speedup.high >= best and f.speedup.high > 1.0]
    return tuple(forecast.setup for forecast in hopeful[:count])


def among_equals(speedups: Mapping[Setup, float]) -> Setup | None:
    """Of the setups within 1.5 % of the fastest measured speed-up: no extra weights first, then the shortest."""
    if not speedups:
        return None
    fastest = max(speedups.values())
    equals = [setup for setup, speedup in speedups.items() if speedup >= fastest / (1.0 + TIE)]
    return min(equals, key=lambda s: (s.draft is not None and s.draft.has_weights, s.length, s.name))


def candidates(drafts: Sequence[Draft], lengths: Sequence[int]) -> tuple[Setup, ...]:
    """Plain decoding first, then every draft at every length, draft by draft; the same draft twice counts once."""
    setups = [PLAIN] + [Setup(draft=draft, length=length) for draft in drafts for length in lengths]
    distinct: dict[str, Setup] = {}
    for setup in setups:
        distinct.setdefault(setup.digest, setup)
    return tuple(distinct.values())
