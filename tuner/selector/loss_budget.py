"""What speculation has cost against plain decoding, and how much more it may cost.

One account for everything a selector does, so that over any 1,000 rounds speculation never loses more than a stated
share of what plain decoding would have taken. It must not know drafts, domains or why a round was run.
"""

from __future__ import annotations

import math
from collections import deque

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

WINDOW = 1000  # rounds
MOST = 12.0  # plain rounds that any stretch of a window may have lost: 1,000 rounds in the time of 1,012 are 0.988
RESERVE = 4.0  # a round may risk a quarter of what is left
FULL_GAIN = 0.4  # of a plain round, from which on all of it may be used
LEAST_SHARE = 0.7  # of it, by what gains nothing


class LossBudget:
    """Rounds of the last 1,000 and what each lost: its time less what plain decoding takes for its tokens.

    All in plain rounds, the time of one round of plain decoding at that batch. `loss` is the largest sum over the
    latest 1, 2, ... 1,000 rounds: what a window that begins there would have lost if all that follows broke even.
    A round risks at most a quarter of what is left of 12, so speculation fades out before it is spent, and comes back
    by its own gains or as losses leave the window. What gains little may use little of it, because it would be long in
    earning it back, and others would be held up.
    """

    __slots__ = ("_floor", "_now", "_total")

    def __init__(self) -> None:
        self._now = 0
        self._total = 0.0
        self._floor: deque[tuple[int, float]] = deque([(0, 0.0)])  # rising totals before rounds of the window

    @property
    def loss(self) -> float:
        """At least 0."""
        return self._total - self._floor[0][1]

    def allowed(self, gain: float = FULL_GAIN) -> float:
        """Plain rounds that the next round may lose at worst, a quarter of what is left.

        `gain`: what a plain round's time is expected to gain.
        """
        most = MOST * min(1.0, LEAST_SHARE + (1.0 - LEAST_SHARE) * gain / FULL_GAIN)
        return (most - self.loss) / RESERVE

    def add(self, lost: float) -> None:
        """Books a round; below 0 it gained."""
        floor = self._floor
        self._now += 1
        self._total = total = self._total + lost
        while floor and floor[-1][1] >= total:
            floor.pop()
        floor.append((self._now, total))
        if floor[0][0] < self._now - WINDOW:
            floor.popleft()

    def charge(self, lost: float) -> None:
        """Books what was spent beside the rounds."""
        self._total += lost

    def snapshot(self) -> dict[str, Any]:
        """The account as JSON values."""
        return {"now": self._now, "total": self._total, "floor": [list(one) for one in self._floor]}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Takes up what `snapshot` told."""
        self._now, self._total = int(kept["now"]), float(kept["total"])
        self._floor = deque((int(now), float(total)) for now, total in kept["floor"])
        if not self._floor or not 0.0 <= self.loss < math.inf:
            raise ValueError("an account that cannot be")
