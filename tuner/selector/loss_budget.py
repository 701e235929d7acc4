"""What speculation has lost against plain decoding, and how much more it may lose.

As in conservative bandits (Wu et al., "Conservative Bandits", 2016): what is not the baseline is run only while its
worst outcome leaves the total above a share of the baseline's, so gains earn the right to explore.
"""

import math
from collections import deque

from profiles.records.errors import require

RESERVE = 0.75  # of what the guarantee allows is used: the time of plain decoding is an estimate
RISK_DIVISOR = 4.0  # a round may risk a quarter of what is left


class LossBudget:
    """Bounds what any `window` consecutive rounds lose against plain decoding, in plain rounds.

    A round's loss is what it takes, in plain rounds, less its tokens per row. `loss` is the largest sum over the latest
    1, 2, ... rounds of the window.

    Args:
        guarantee: least throughput over plain decoding; None: no bound.
    """

    LEARNED = ("_now", "_total")

    def __init__(self, guarantee: float | None, window: int) -> None:
        require(window >= 1, f"window of {window} rounds: at least 1 is needed")
        require(
            guarantee is None or 0.0 < guarantee < 1.0,
            f"guarantee {guarantee}: a fraction of plain decoding's throughput, or None, is needed",
        )
        self.window = window
        self._max_loss = math.inf if guarantee is None else RESERVE * (1.0 / guarantee - 1.0) * window
        self._now = 0.0
        self._total = 0.0
        self.minima: deque[tuple[float, float]] = deque([(0.0, 0.0)])  # increasing totals before rounds of the window

    @property
    def loss(self) -> float:
        return self._total - self.minima[0][1]

    @property
    def allowed(self) -> float:
        """Plain rounds that the next round may lose at worst."""
        return (self._max_loss - self.loss) / RISK_DIVISOR

    @property
    def left(self) -> float:
        """Share of the budget."""
        return 1.0 if self._max_loss == math.inf else 1.0 - self.loss / self._max_loss

    def add(self, lost: float, count: float = 1.0) -> None:
        """Counts rounds that lost so many plain rounds in all; below 0 they gained."""
        minima = self.minima
        self._now += count
        self._total = total = self._total + lost
        while minima and minima[-1][1] >= total:
            minima.pop()
        minima.append((self._now, total))
        while minima[0][0] < self._now - self.window:
            minima.popleft()
