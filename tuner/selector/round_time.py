"""What rounds take beside plain ones: stored ratios, corrected by the rounds that are run."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

PRIOR_LOG_STD = 0.027  # of a setup's stored time over plain's: at rounds that scatter by 17 % the weight of 40 rounds
MAX_ROUNDS = 400.0  # that the mean of a setup's deviation is taken over
AGING_ROUNDS = 2048  # after which the rounds behind a deviation weigh half
MACHINE_WEIGHT = 1.0 / 16.0  # of the latest round in the machine's factor
NOISE_ROUNDS = 64  # that the scatter of rounds is taken over
INITIAL_NOISE, INITIAL_ROUNDS = 0.06, 8  # standard deviation of a round's logarithm until it is known; its weight
JUMP_LOG_RATIO, JUMP_NOISES, JUMP_ROUNDS = math.log(1.2), 2.5, 3
SETTLING_ROUNDS = 8  # after a change to a draft, in which a jump to slower rounds is the draft's
MAX_DRAFT_JUMP = math.log(2.0)  # a stall of the machine looks alike, and must not shut a draft out


class Deviation:
    """How far the rounds of a setup lie from the stored ones, as a logarithm, beside the machine's factor."""

    LEARNED = ("last", "log", "rounds")
    __slots__ = LEARNED

    def __init__(self) -> None:
        self.log = self.rounds = 0.0
        self.last = -(10**9)  # in rounds of the selector

    def observe(self, residual: float, prior_rounds: float, now: int, count: int) -> None:
        if now - self.last > AGING_ROUNDS:
            self.rounds *= 0.5 ** ((now - self.last) / AGING_ROUNDS)
        self.rounds = min(MAX_ROUNDS, self.rounds + count)
        self.log += residual * min(1.0, count / (self.rounds + prior_rounds))
        self.last = now


class RoundTimeModel:
    """Round times at one batch size, context and temperature, by option and length; option 0 is plain decoding.

    The logarithm of a round's seconds over the stored ones is the sum of the machine's factor, which every round tells,
    of the draft's deviation and of the length's, both shrunk to 0, and of noise. Three rounds in a row that deviate to
    the same side are a jump by the smallest of the three: of a draft that was just changed to and is slower, up to 2x,
    or no longer is, else of the machine. Plain decoding never jumps by itself: all gains and losses are told over it.

    Args:
        seconds: by option, stored seconds of a round by the tokens that its widest row proposes.
        num_lengths: by option.
    """

    LEARNED = ("machine", "variance", "_count", "_setup", "_since", "_same_side", "_smallest")

    def __init__(self, seconds: Sequence[Sequence[float]], num_lengths: Sequence[int]) -> None:
        self.seconds = [tuple(row) for row in seconds]
        self.drafts = [Deviation() for _ in seconds]
        self.lengths = [[Deviation() for _ in range(count)] for count in num_lengths]
        self.machine = 0.0  # log factor
        self.variance, self._count = INITIAL_NOISE**2, INITIAL_ROUNDS
        self._prior_variance = PRIOR_LOG_STD**2
        self._setup, self._since = (-1, -1), 0
        self._same_side, self._smallest = 0, 0.0

    @property
    def prior_rounds(self) -> float:
        """Rounds that the stored ratios weigh: fewer where those of other drafts turned out wrong."""
        return self.variance / self._prior_variance

    def update(self) -> None:
        """Recomputes how far stored ratios may be off."""
        heard = [draft.log for draft in self.drafts if draft.rounds]
        self._prior_variance = PRIOR_LOG_STD**2 + sum([log * log for log in heard]) / (1 + len(heard))

    def relative_error(self, option: int, now: int) -> float:
        """Standard error of an option's factor."""
        deviation = self.drafts[option]
        rounds = deviation.rounds * 0.5 ** ((now - deviation.last) / AGING_ROUNDS)
        return math.sqrt(self.variance / (rounds + self.prior_rounds))

    def observe(self, setup: tuple[int, int], ratio: float, now: int, *, idle: bool = False, count: int = 1) -> None:
        """Rounds of a setup took `ratio` times the stored seconds.

        Args:
            now: rounds so far.
            idle: nothing was proposed: a plain round, with a look-up that found nothing.
            count: rounds behind the ratio.
        """
        option, index = (0, 0) if idle else setup
        draft, length = self.drafts[option], self.lengths[option][index]
        expected = draft.log + length.log
        if self._count == INITIAL_ROUNDS:
            self.machine = math.log(ratio) - expected
        residual = math.log(ratio) - expected - self.machine
        if self._setup != setup:
            self._setup, self._since = setup, 0
        self._since += count
        limit = max(JUMP_LOG_RATIO, JUMP_NOISES * math.sqrt(self.variance))
        side = (residual > limit) - (residual < -limit)
        continues = side * self._same_side > 0
        self._smallest = min(self._smallest, residual, key=abs) if continues else residual
        self._same_side = self._same_side + side if continues else side
        if abs(self._same_side) >= JUMP_ROUNDS:
            self._same_side = 0
            is_slower = self._smallest > 0.0
            if option and self._since <= SETTLING_ROUNDS and (is_slower or draft.log > limit):
                draft.log = draft.log + min(MAX_DRAFT_JUMP, self._smallest) if is_slower else 0.0
            else:
                self.machine += self._smallest
            return
        residual = min(max(residual, -limit), limit)
        self._count = min(self._count + count, NOISE_ROUNDS)
        self.variance += min(1.0, count / self._count) * (residual * residual * count - self.variance)
        self.machine += (1.0 - (1.0 - MACHINE_WEIGHT) ** count) * residual
        prior_rounds = self.prior_rounds
        draft.observe(residual, prior_rounds, now, count)
        if option:
            length.observe(residual, 2.0 * prior_rounds, now, count)

    def parts(self) -> Iterator[Any]:
        """What learns, for snapshots."""
        yield from (self, *self.drafts, *(length for row in self.lengths for length in row))
