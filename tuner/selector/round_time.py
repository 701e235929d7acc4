"""Round times at run time: stored seconds, and how much longer rounds really last."""

import math
from collections.abc import Sequence

MIN_ROUND_WEIGHT = 1.0 / 16.0  # of the latest round in the mean; the first rounds weigh more
MIN_PLAIN_ROUND_WEIGHT = 1.0 / 64.0  # the same for plain decoding, which all losses are measured against
FIRST_ROUND_WEIGHT = 1.0 / 4.0  # the stored time counts as this round's inverse less one
INITIAL_LOG_VARIANCE = 0.05**2  # of a round's time, until it is known
JUMP_LOG_RATIO, JUMP_ROUNDS = math.log(1.2), 3  # one round counts as at most so much longer or shorter than expected


class TimeFactor:
    """How many times longer rounds of one setup last than stored: exponential of a running mean of logarithms.

    `value` is 0 while no round was observed, or not for long. Three rounds in a row that deviate by a fifth to the same
    side are a jump: from there on the earlier ones, and the stored time, no longer count.

    Args:
        min_weight: weight of the latest round at least.
    """

    __slots__ = ("_log", "_min_weight", "_same_side", "_variance", "_weight", "last", "value")

    def __init__(self, min_weight: float) -> None:
        self._min_weight = min_weight
        self.value = 0.0
        self.last = 0
        self._log = 0.0
        self._weight = FIRST_ROUND_WEIGHT
        self._variance = INITIAL_LOG_VARIANCE
        self._same_side = 0  # rounds in a row that were off: positive when longer, negative when shorter

    @property
    def low(self) -> float:
        """The value less a standard error."""
        return self.value * (1.0 - math.sqrt(self._variance * self._weight))

    def observe(self, ratio: float, now: int, *, expected: float) -> bool:
        """A round took `ratio` times its stored seconds. Returns whether it completed a jump.

        Args:
            expected: the factor assumed as long as none is known.
        """
        if not self.value:
            self._log, self._weight, self._same_side = math.log(expected), FIRST_ROUND_WEIGHT, 0
        deviation = math.log(ratio) - self._log
        side = (deviation > JUMP_LOG_RATIO) - (deviation < -JUMP_LOG_RATIO)
        self._same_side = self._same_side + side if side * self._same_side > 0 else side
        jumped = abs(self._same_side) >= JUMP_ROUNDS
        if jumped:
            self._weight, self._same_side = 1.0, 0
        else:
            deviation = min(max(deviation, -JUMP_LOG_RATIO), JUMP_LOG_RATIO)
            self._variance += MIN_ROUND_WEIGHT * (deviation * deviation - self._variance)
        self._weight = max(self._min_weight, self._weight / (1.0 + self._weight))  # 1/2, 1/3, 1/4 ...
        self._log += self._weight * deviation
        self.value, self.last = math.exp(self._log), now
        return jumped

    def snapshot(self) -> list[float]:
        return [self.value, self.last, self._log, self._weight, self._variance, self._same_side]

    def restore(self, snapshot: Sequence[float]) -> None:
        """Raises ValueError: values that are not finite."""
        if not all(math.isfinite(value) for value in snapshot):
            raise ValueError("times that are not finite")
        self.value, last, self._log, self._weight, self._variance, same_side = snapshot
        self.last, self._same_side = int(last), int(same_side)


class RoundTimeModel:
    """Round times of one draft (or plain decoding) at one batch size and context.

    `seconds[p]` is the stored time of a round whose widest row proposes p tokens, `factors[i]` belongs to the i-th
    length. `catch_up_s`: time in which a draft model takes in text of half the context.
    """

    __slots__ = ("catch_up_s", "factors", "seconds")

    def __init__(self, seconds: Sequence[float], num_lengths: int, catch_up_s: float = 0.0) -> None:
        self.seconds = tuple(seconds)
        self.catch_up_s = catch_up_s
        min_weight = MIN_PLAIN_ROUND_WEIGHT if len(self.seconds) == 1 else MIN_ROUND_WEIGHT
        self.factors = [TimeFactor(min_weight) for _ in range(num_lengths)]

    def snapshot(self) -> list[list[float]]:
        return [factor.snapshot() for factor in self.factors]

    def restore(self, snapshot: Sequence[Sequence[float]]) -> None:
        for factor, values in zip(self.factors, snapshot, strict=True):
            factor.restore(values)
