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
    """Bounds the seconds lost against plain decoding in any `window` consecutive rounds, and from the start on.

    A round's loss is what it takes less what plain decoding takes for its tokens. `loss` is the largest sum over the
    latest 1, 2, ... rounds of the window. What may be lost is a share of what a window of plain rounds takes, of those
    that take the least of late: losses of slow rounds in large batches stay bounded when small batches follow. From the
    start on it is that share of all plain rounds so far, at least of a window.

    Args:
        guarantee: least throughput over plain decoding; None: no bound.
    """

    key = "budget"
    LEARNED = ("_now", "_plain_s", "_elapsed_s", "_total", "loss")

    def __init__(self, guarantee: float | None, window: int) -> None:
        require(window >= 1, f"window of {window} rounds: at least 1 is needed")
        require(
            guarantee is None or 0.0 < guarantee < 1.0,
            f"guarantee {guarantee}: a fraction of plain decoding's throughput, or None, is needed",
        )
        self._window = window
        self._share = math.inf if guarantee is None else RESERVE * (1.0 / guarantee - 1.0)
        self._now = self._total = self._plain_s = self._elapsed_s = 0.0
        self._minima = deque([(0.0, 0.0)])  # (rounds, total) before rounds of the window, both increasing

    @property
    def loss(self) -> float:
        return self._total - self._minima[0][1]

    @loss.setter
    def loss(self, loss: float) -> None:
        """Of an earlier process; it stays for a whole window."""
        self._minima = deque([(self._now, self._total - max(0.0, loss))])

    def allowed_s(self, plain_s: float) -> float:
        """Seconds that the next round may lose at worst; `plain_s`: of a plain round, as in `add`."""
        window_s = self._window * min(plain_s, self._plain_s or plain_s)
        in_window_s = self._share * window_s - self.loss
        return min(in_window_s, self._share * max(window_s, self._elapsed_s) - self._total) / RISK_DIVISOR

    @property
    def left(self) -> float:
        """Share of the window's budget."""
        return 1.0 - self.loss / (self._share * self._window * self._plain_s) if self._plain_s else 1.0

    def add(self, lost_s: float, plain_s: float, count: float = 1.0) -> None:
        """Counts rounds that lost so many seconds in all; below 0 they gained. `plain_s`: of a plain round."""
        minima = self._minima
        self._now += count
        self._elapsed_s += count * plain_s
        mean_s = self._plain_s + min(1.0, count / self._window) * (plain_s - self._plain_s)
        self._plain_s = min(plain_s, mean_s) if self._plain_s else plain_s
        self._total = total = self._total + lost_s
        while minima and minima[-1][1] >= total:
            minima.pop()
        minima.append((self._now, total))
        while minima[0][0] < self._now - self._window:
            minima.popleft()
