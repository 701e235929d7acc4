"""How the candidates of the anchor under way stand, told at every change to whoever shows it.

The decision never reads it back: it is for people who watch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from profiles.records.core import Interval, Setup
from tuner.policy.estimates import Forecast, Standing

Show = Callable[[Sequence[Standing]], None]


class LiveStandings:
    """The standings of one anchor at a time."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._rows: dict[Setup, Standing] = {}

    def open(self, domain: str, forecasts: Sequence[Forecast]) -> None:
        """Begins an anchor with nothing but forecasts."""
        self._rows = {
            one.setup: Standing(
                domain=domain, setup_name=one.setup.name, forecast=one.speedup, measured=None, state="forecast"
            )
            for one in forecasts
        }
        self._show(tuple(self._rows.values()))

    def note(self, setup: Setup, state: str, measured: Interval | None = None) -> None:
        """A candidate's new state; what was measured of it before stays until there is something newer."""
        row = self._rows[setup]
        self._rows[setup] = replace(row, state=state, measured=measured or row.measured)
        self._show(tuple(self._rows.values()))
