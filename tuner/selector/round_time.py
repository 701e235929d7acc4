"""What rounds take beside plain ones: stored ratios, corrected by the rounds that are run."""

import math
from collections.abc import Sequence

PRIOR_LOG_STD = 0.027  # of a setup's stored time over plain's: at rounds that scatter by 17 % the weight of 40 rounds
MAX_ROUNDS = 400.0  # that the mean of a setup's deviation is taken over
AGING_ROUNDS = 2048  # after which the rounds behind a deviation weigh half
MACHINE_WEIGHT = 1.0 / 16.0  # of the latest round in the machine's factor
NOISE_ROUNDS = 64  # that the scatter of rounds is taken over
INITIAL_NOISE, INITIAL_ROUNDS = 0.06, 8  # standard deviation of a round's logarithm until it is known; its weight
JUMP_LOG_RATIO, JUMP_NOISES, JUMP_ROUNDS = math.log(1.2), 2.5, 3
SETTLING_ROUNDS = 8  # after a change of draft or length, in which a jump to slower rounds is the draft's
MAX_DRAFT_JUMP = math.log(2.0)  # a stall of the machine looks alike, and must not shut a draft out


class RoundTimeModel:
    """Round times at one batch size, context and temperature, by option and length; option 0 is plain decoding.

    The logarithm of a round's seconds over the stored ones is the sum of the machine's factor, which every round tells,
    of the draft's deviation and of the length's, both shrunk to 0, and of noise. Three rounds in a row that deviate to
    the same side are a jump by the smallest of the three: of a draft that was just changed to and is slower, up to 2x,
    or no longer is, else of the machine. Plain decoding never jumps by itself: all gains and losses are told over it.

    Args:
        num_lengths: by option.
    """

    LEARNED = ("machine", "variance", "_count", "_same_side", "_smallest", "logs", "rounds", "last", "length_logs")

    def __init__(self, num_lengths: Sequence[int], key: str = "") -> None:
        self.key = key
        self.machine = 0.0  # log factor
        self.variance, self._count = INITIAL_NOISE**2, INITIAL_ROUNDS
        self._same_side, self._smallest = 0, 0.0
        # by option: deviation, rounds behind it, and when it was run last, in rounds of the selector
        self.logs, self.rounds = [0.0] * len(num_lengths), [0.0] * len(num_lengths)
        self.last = [-(10**9)] * len(num_lengths)
        self.length_logs = [[0.0] * number for number in num_lengths]
        self._setup, self._since = (-1, 0), 0
        self.changes = [0] * len(num_lengths)  # by option: times that its deviations may have changed
        self.update()

    def factors(self, option: int) -> list[float]:
        """Of an option's rounds by length, beside the machine's."""
        log = self.logs[option]
        return [math.exp(log + length_log) for length_log in self.length_logs[option]]

    def update(self) -> None:
        """Recomputes how far a round may deviate, and the rounds that stored ratios weigh.

        These are fewer where the ratios of other drafts turned out wrong.
        """
        self._limit = max(JUMP_LOG_RATIO, JUMP_NOISES * math.sqrt(self.variance))
        deviations = [log * log for log, rounds in zip(self.logs, self.rounds, strict=True) if rounds]
        self.prior_rounds = self.variance / (PRIOR_LOG_STD**2 + sum(deviations) / (1 + len(deviations)))

    def relative_error(self, option: int, now: int) -> float:
        """Standard error of an option's factor."""
        rounds = self.rounds[option] * 0.5 ** ((now - self.last[option]) / AGING_ROUNDS)
        return math.sqrt(self.variance / (rounds + self.prior_rounds))

    def observe(self, setup: tuple[int, int], ratio: float, now: int, count: int = 1) -> None:
        """So many rounds of a setup took `ratio` times the stored seconds. `now`: rounds so far."""
        option, index = setup
        lengths = self.length_logs[option]
        residual = math.log(ratio) - self.machine - self.logs[option] - lengths[index]
        self.changes[option] += 1
        if self._count == INITIAL_ROUNDS:
            self.machine += residual
            residual = 0.0
        if self._setup != setup:
            self._setup, self._since = setup, 0
        self._since += count
        limit = self._limit
        if abs(residual) > limit:
            if self._jumps(residual, limit):
                return
            residual = math.copysign(limit, residual)
        else:
            self._same_side = 0
        self._count = num_rounds = min(self._count + count, NOISE_ROUNDS)
        self.variance += min(1.0, count / num_rounds) * (residual * residual * count - self.variance)
        self.machine += residual * (MACHINE_WEIGHT if count == 1 else 1.0 - (1.0 - MACHINE_WEIGHT) ** count)
        rounds = min(MAX_ROUNDS, self.rounds[option] + count)
        self.rounds[option], self.last[option] = rounds, now
        self.logs[option] += residual * min(1.0, count / (rounds + self.prior_rounds))
        if option:
            lengths[index] += residual * min(1.0, count / (rounds + 2.0 * self.prior_rounds))

    def _jumps(self, residual: float, limit: float) -> bool:
        """Whether the latest rounds are a jump, which is then taken over."""
        side = 1 if residual > 0.0 else -1
        continues = side * self._same_side > 0
        self._smallest = min(self._smallest, residual, key=abs) if continues else residual
        self._same_side = self._same_side + side if continues else side
        if abs(self._same_side) < JUMP_ROUNDS:
            return False
        self._same_side, option = 0, self._setup[0]
        if option and self._since <= SETTLING_ROUNDS and (side > 0 or self.logs[option] > limit):
            self.logs[option] = self.logs[option] + min(MAX_DRAFT_JUMP, self._smallest) if side > 0 else 0.0
        else:
            self.machine += self._smallest
        return True
