"""What "best" means: the score of a forecast, the finalists of a race, and the choice among near-equal setups."""

from collections.abc import Mapping, Sequence

from profiles.records.core import PLAIN, Draft, Setup
from tuner.policy.estimates import Forecast

TIE = 0.015  # setups whose speed-ups differ by less are near-equal
MIN_SPEEDUP = 1.0 + TIE  # of a win that is claimed


def score(forecast: Forecast) -> float:
    """The low end of the forecast speed-up, so that a wide interval does not win by chance; 1 for plain decoding."""
    return forecast.speedup.low if forecast.setup.draft is not None else 1.0


def worth_racing(forecasts: Sequence[Forecast]) -> tuple[Setup, ...]:
    """The drafting setups whose interval reaches the best score and over 1, best estimate first."""
    drafting = [forecast for forecast in forecasts if forecast.setup.draft is not None]
    ordered = sorted(drafting, key=lambda forecast: -forecast.speedup.estimate)
    best = max((score(forecast) for forecast in drafting), default=0.0)
    hopeful = [forecast for forecast in ordered if forecast.speedup.high >= best and forecast.speedup.high > 1.0]
    return tuple(forecast.setup for forecast in hopeful)


def among_equals(speedups: Mapping[Setup, float]) -> Setup | None:
    """The setup to take of those within 1.5 % of the fastest: without weights first, then the shortest, the fastest.

    A setup that is too slow to be claimed is never preferred to one that is not.
    """
    if not speedups:
        return None
    fastest = max(speedups.values())
    bar = max(fastest / (1.0 + TIE), min(fastest, MIN_SPEEDUP))
    equals = [setup for setup, speedup in speedups.items() if speedup >= bar]
    return min(equals, key=lambda s: (s.draft is not None and s.draft.has_weights, s.length, -speedups[s]))


def candidates(drafts: Sequence[Draft], lengths: Sequence[int]) -> tuple[Setup, ...]:
    """Plain decoding first, then every draft at every length; a draft that was given twice counts once."""
    by_digest = {PLAIN.digest: PLAIN}
    for draft in drafts:
        for length in lengths:
            setup = Setup(draft=draft, length=length)
            by_digest.setdefault(setup.digest, setup)
    return tuple(by_digest.values())
