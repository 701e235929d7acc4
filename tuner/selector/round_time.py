"""Round times at run time: stored seconds, and how much longer rounds really last."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

MIN_ROUND_WEIGHT = 1.0 / 16.0  # of the latest round in the mean; the first rounds weigh more
MIN_PLAIN_ROUND_WEIGHT = 1.0 / 64.0  # the same for plain decoding, which all losses are measured against
FIRST_ROUND_WEIGHT = 1.0 / 4.0  # the stored time counts as three rounds
INITIAL_LOG_VARIANCE = 0.05**2  # of a round's time, until it is known
JUMP_LOG_RATIO, JUMP_ROUNDS = math.log(1.2), 3  # a round counts as at most so much longer or shorter than expected


@dataclass(slots=True)
class TimeFactor:
    """How many times longer rounds of one setup last than stored: exponential of a running mean of logarithms.

    `value` is 0 while no round was observed, or not for long. Three rounds in a row that deviate by a fifth to the same
    side are a jump by the smallest of the three: two spikes and an ordinary round are none. From there on the earlier
    rounds, and the stored time, count little.
    """

    min_weight: float  # of the latest round in the mean
    value: float = 0.0
    last: int = 0  # when it was observed, in rounds of the selector
    log: float = 0.0
    weight: float = FIRST_ROUND_WEIGHT
    variance: float = INITIAL_LOG_VARIANCE
    same_side: int = 0  # rounds in a row that deviated: positive when longer, negative when shorter
    smallest: float = 0.0  # deviation of these rounds

    @property
    def low(self) -> float:
        """The value less a standard error."""
        return self.value * (1.0 - math.sqrt(self.variance * self.weight))

    def observe(self, ratio: float, now: int, *, expected: float) -> bool:
        """A round took `ratio` times its stored seconds. Returns whether it completed a jump.

        Args:
            expected: the factor assumed as long as none is known.
        """
        if not self.value:
            self.log, self.weight, self.same_side = math.log(expected), FIRST_ROUND_WEIGHT, 0
        deviation = math.log(ratio) - self.log
        side = (deviation > JUMP_LOG_RATIO) - (deviation < -JUMP_LOG_RATIO)
        continues = side * self.same_side > 0
        self.smallest = min(self.smallest, deviation, key=abs) if continues else deviation
        self.same_side = self.same_side + side if continues else side
        jumped = abs(self.same_side) >= JUMP_ROUNDS
        if jumped:
            deviation, self.weight, self.same_side = self.smallest, 1.0, 0
        else:
            deviation = min(max(deviation, -JUMP_LOG_RATIO), JUMP_LOG_RATIO)
            self.variance += MIN_ROUND_WEIGHT * (deviation * deviation - self.variance)
        self.weight = max(self.min_weight, self.weight / (1.0 + self.weight))  # 1/2, 1/3, 1/4 ...
        self.log += self.weight * deviation
        self.value, self.last = math.exp(self.log), now
        return jumped


class RoundTimeModel:
    """Round times of one draft (or plain decoding) at one batch size and context.

    `seconds[p]` is the stored time of a round whose widest row proposes p tokens, `factors[i]` belongs to the i-th
    length. `catch_up_s`: time in which a draft model takes in text of half the context.
    """

    def __init__(self, seconds: Sequence[float], num_lengths: int, catch_up_s: float = 0.0) -> None:
        self.seconds = tuple(seconds)
        self.catch_up_s = catch_up_s
        min_weight = MIN_PLAIN_ROUND_WEIGHT if len(self.seconds) == 1 else MIN_ROUND_WEIGHT
        self.factors = [TimeFactor(min_weight) for _ in range(num_lengths)]

    def snapshot(self) -> list[list[float]]:
        return [list(astuple(factor)) for factor in self.factors]

    def restore(self, snapshot: Sequence[Sequence[float]]) -> None:
        """Raises ValueError or TypeError: not the times of so many lengths, or not finite."""
        if len(snapshot) != len(self.factors) or not all(math.isfinite(value) for row in snapshot for value in row):
            raise ValueError("impossible round times")
        self.factors = [TimeFactor(*row) for row in snapshot]  # type: ignore[arg-type]
