"""How the candidates of the current operating point stand, shown at every change. Nothing is decided by it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from profiles.records.core import Interval, Setup
from tuner.policy.estimates import Forecast, Standing

Show = Callable[[Sequence[Standing]], None]


class LiveStandings:
    """The standings of one operating point, at first nothing but forecasts."""

    def __init__(self, show: Show, domain: str, forecasts: Sequence[Forecast]) -> None:
        self._show = show
        self._rows = {
            forecast.setup: Standing(
                domain=domain,
                setup_name=forecast.setup.name,
                forecast=forecast.speedup,
                measured=None,
                state="forecast",
            )
            for forecast in forecasts
        }
        self._show(tuple(self._rows.values()))

    def note(self, setup: Setup, state: str, measured: Interval | None = None) -> None:
        """A candidate's new state; an earlier measurement stays until there is a newer one."""
        row = self._rows[setup]
        self._rows[setup] = replace(row, state=state, measured=measured or row.measured)
        self._show(tuple(self._rows.values()))
