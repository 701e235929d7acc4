"""What speculation has lost against plain decoding, and how much more it may lose."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from profiles.records.errors import require

WINDOW = 1000  # rounds
MAX_LOSS_SHARE = 0.012  # of a window's plain rounds: 1,000 rounds in the time of 1,012 run at 0.988 of plain decoding
RISK_DIVISOR = 4.0  # a round may risk a quarter of what is left
FULL_BUDGET_GAIN = 0.4  # gain of a plain round's time from which on the whole budget may be used
MIN_BUDGET_SHARE = 0.7  # of the budget, for what gains nothing


class LossBudget:
    """Bounds what any `window` consecutive rounds lose against plain decoding, in plain rounds.

    A round's loss is its time less what plain decoding takes for its tokens, in the time of a plain round of that
    batch. `loss` is the largest sum over the latest 1, 2, ... rounds of the window. A round may risk a quarter of what
    is left, so speculation fades out before the budget is spent and returns by its gains or as losses leave the window.
    Setups that gain little may use less of it: they would take long to earn it back and block the others meanwhile.
    """

    def __init__(self, window: int = WINDOW) -> None:
        require(window >= 1, f"loss window of {window} rounds: at least 1 is needed")
        self.window = window
        self._max_loss = MAX_LOSS_SHARE * window
        self._now = 0
        self._total = 0.0
        self._minima: deque[tuple[int, float]] = deque([(0, 0.0)])  # increasing totals before rounds of the window

    @property
    def loss(self) -> float:
        return self._total - self._minima[0][1]

    def left(self, gain: float = FULL_BUDGET_GAIN) -> float:
        """Plain rounds that may still be lost in all.

        Args:
            gain: tokens that the setup is expected to yield in the time of a plain round, less one.
        """
        share = MIN_BUDGET_SHARE + (1.0 - MIN_BUDGET_SHARE) * gain / FULL_BUDGET_GAIN
        return self._max_loss * min(1.0, share) - self.loss

    def allowed(self, gain: float = FULL_BUDGET_GAIN) -> float:
        """Plain rounds that the next round may lose at worst; see `left`."""
        return self.left(gain) / RISK_DIVISOR

    def add(self, lost: float) -> None:
        """Counts a round that lost so many plain rounds; below 0 it gained."""
        minima = self._minima
        self._now += 1
        self._total = total = self._total + lost
        while minima and minima[-1][1] >= total:
            minima.pop()
        minima.append((self._now, total))
        if minima[0][0] < self._now - self.window:
            minima.popleft()

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"now": self._now, "total": self._total, "minima": [list(minimum) for minimum in self._minima]}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Takes over a snapshot. Raises ValueError: impossible values."""
        self._now, self._total = int(snapshot["now"]), float(snapshot["total"])
        self._minima = deque((int(now), float(total)) for now, total in snapshot["minima"])
        if not self._minima or not 0.0 <= self.loss < math.inf:
            raise ValueError("an impossible loss")
