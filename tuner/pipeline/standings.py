"""The best candidate of the current operating point so far, told at every change. Nothing is decided by it."""

from collections.abc import Callable, Sequence

from profiles.records.core import PLAIN, Interval, Setup
from tuner.policy.estimates import Forecast

Show = Callable[[str], None]


class LiveStandings:
    """The standings of one operating point, at first nothing but forecasts."""

    def __init__(self, show: Show, domain: str, forecasts: Sequence[Forecast]) -> None:
        self._show, self._domain = show, domain
        self._forecasts = {row.setup: row.speedup for row in forecasts if row.setup != PLAIN}
        self._measured: dict[Setup, Interval] = {}
        self._states = dict.fromkeys(self._forecasts, "forecast")
        self._tell()

    def note(self, setup: Setup, state: str, measured: Interval | None = None) -> None:
        """A candidate's new state; an earlier measurement stays until there is a newer one."""
        if setup != PLAIN:
            self._states[setup] = state
            if measured is not None:
                self._measured[setup] = measured
            self._tell()

    def _tell(self) -> None:
        """The best by what was measured, before that by forecast."""
        rows = self._measured or self._forecasts
        if rows:
            setup = max(rows, key=lambda candidate: rows[candidate].estimate)
            ratio, state = f"{rows[setup]:.2f}", self._states[setup]
            self._show(f"{self._domain}: {setup.name} at {ratio} is the best so far ({state})")
