"""Expected tokens per round of one draft on one domain: stored evidence, updated by the rounds that are run.

A position behind a rejection was not tested, so it is not counted. Plain loops over short lists: this runs once per
round in serving code.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.policy.prior import DraftAcceptance

MAX_PRIOR_ROUNDS = 64.0  # weight of the stored evidence at most, because the text served may differ from it
HALF_LIFE_ROUNDS = 1024.0  # of the selector
PRIOR_ROUNDS_AFTER_CHANGE = 16.0
CHANGE_WINDOW = 32  # rounds in which a change of acceptance is noticed
CHANGE_STD_ERRORS = 4.0  # of rounds drawn independently; rounds of one text are alike
MIN_VARIANCE = 0.05
_DECAY = 1.0 - 1.0 / CHANGE_WINDOW
_MIN_CALIBRATION = 1e-9
_MAX_SCALE = 1e30
_LEARNED = (
    "_tested", "_accepted", "_scale", "_prior_weight", "_last", "_recent", "_deviation", "_deviation_variance",
)  # fmt: skip


class AcceptanceModel:
    """Posterior acceptance by position, and what it makes of every length.

    `mean_tokens[i]` is the mean number of tokens of a round at `lengths[i]`, the bonus token included, `variances[i]`
    its variance. `propose_prob` is the share of rounds that propose anything, `weight` the number of rounds behind the
    figures. A position's probability is (stored probability x stored weight + accepted) / (stored weight + tested).

    Counts decay as rounds of the selector pass, so the figures return to the stored ones. When the latest rounds
    deviate by 4 standard errors, only they are kept and the stored evidence weighs 16 rounds, after another change 8,
    and so on; its weight then recovers at the rate of the decay.
    """

    def __init__(self, stored: DraftAcceptance, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._prior = (stored.propose_prob, *stored.accept_probs)  # index 0: whether anything is proposed
        self._tested = [0.0] * len(self._prior)
        self._accepted = [0.0] * len(self._prior)
        self._scale = 1.0  # weight of a new round: it grows, instead of all earlier counts shrinking
        self._max_prior_weight = self._prior_weight = min(MAX_PRIOR_ROUNDS, max(1.0, stored.num_rounds))
        self._last = 0
        self._recent: list[Sequence[int]] = []
        self._deviation = self._deviation_variance = 0.0
        square_steps = [2.0 * position - 1.0 for position in range(1, len(self._prior))]
        calibration = _calibration(stored, self.lengths)
        self._positions = tuple(zip(stored.accept_probs, calibration, square_steps, strict=True))
        self.propose_prob = stored.propose_prob
        self.mean_tokens, self.variances = [1.0] * len(self.lengths), [0.0] * len(self.lengths)
        self.update()

    @property
    def weight(self) -> float:
        return self._prior_weight + self._tested[0] / self._scale

    def observe(self, rows: Sequence[tuple[int, int]], index: int, now: int) -> None:
        """Counts (proposed, accepted) of rounds at `lengths[index]`; the figures follow with the next `update`.

        Args:
            now: number of rounds of the selector so far.
        """
        self.decay(now)
        mean = self.mean_tokens[index] - 1.0
        variance = max(self.variances[index], MIN_VARIANCE)
        for proposed, accepted in rows:
            self._count(proposed, accepted)
            self._deviation = self._deviation * _DECAY + accepted - mean
            self._deviation_variance = self._deviation_variance * _DECAY * _DECAY + variance
            self._recent.append((proposed, accepted))
        del self._recent[:-CHANGE_WINDOW]
        if self._deviation * self._deviation > CHANGE_STD_ERRORS * CHANGE_STD_ERRORS * self._deviation_variance:
            self._restart()

    def decay(self, now: int) -> None:
        """Decays the counts until `now`, in rounds of the selector."""
        passed = now - self._last
        if passed > 0:
            self._last = now
            growth = 2.0 ** min(passed / HALF_LIFE_ROUNDS, 64.0)
            self._scale *= growth
            self._prior_weight = self._max_prior_weight - (self._max_prior_weight - self._prior_weight) / growth
            if self._scale > _MAX_SCALE:
                self._tested = [count / self._scale for count in self._tested]
                self._accepted = [count / self._scale for count in self._accepted]
                self._scale = 1.0

    def update(self) -> None:
        """Recomputes the figures from the counts, in place: nothing for the garbage collector."""
        weight, expected, squares = self._prior_weight * self._scale, 0.0, 0.0
        accepted, tested = iter(self._accepted), iter(self._tested)
        reached = self.propose_prob = (weight * self._prior[0] + next(accepted)) / (weight + next(tested))
        index = 0
        for (prior, calibration, square_step), num_accepted, num_tested in zip(
            self._positions, accepted, tested, strict=True
        ):
            reached *= (weight * prior + num_accepted) / (weight + num_tested)
            expected += reached
            squares += square_step * reached  # E[n^2] = sum of (2i - 1) P(n >= i)
            if calibration:
                self.mean_tokens[index] = 1.0 + expected * calibration
                self.variances[index] = squares - expected * expected
                index += 1

    def snapshot(self) -> dict[str, Any]:
        """What was learned, as JSON values."""
        return copy.deepcopy({name: getattr(self, name) for name in _LEARNED})

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Takes over a snapshot of a model with the same lengths. Raises ValueError: impossible counts."""
        for name in _LEARNED:
            setattr(self, name, copy.deepcopy(snapshot[name]))
        counts = [*self._tested, *self._accepted]
        weights_fit = 0.0 < self._prior_weight < math.inf and 0.0 < self._scale < math.inf
        counts_fit = len(counts) == 2 * len(self._prior) and 0.0 <= min(counts) <= max(counts) < math.inf
        if not (weights_fit and counts_fit and len(self._recent) <= CHANGE_WINDOW):
            raise ValueError("impossible acceptance counts")
        self.update()

    def _count(self, proposed: int, accepted: int) -> None:
        tested, counts, scale = self._tested, self._accepted, self._scale
        tested[0] += scale
        if proposed:
            counts[0] += scale
            for position in range(1, accepted + 1):
                tested[position] += scale
                counts[position] += scale
            if accepted < proposed:
                tested[accepted + 1] += scale

    def _restart(self) -> None:
        """Keeps only the latest rounds."""
        size = len(self._prior)
        self._tested, self._accepted = [0.0] * size, [0.0] * size
        self._prior_weight = min(PRIOR_ROUNDS_AFTER_CHANGE, self._prior_weight / 2.0)
        self._deviation, self._deviation_variance, self._scale = 0.0, 0.0, 1.0
        for proposed, accepted in self._recent:
            self._count(proposed, accepted)


def _calibration(stored: DraftAcceptance, lengths: Sequence[int]) -> tuple[float, ...]:
    """By position: measured over computed number of accepted tokens at that length; 0 where it is no length.

    The acceptance probabilities are those of the longest rounds; shorter rounds start elsewhere in the text.
    """
    factors = [0.0] * len(stored.accept_probs)
    reached, expected, computed = stored.propose_prob, 0.0, [0.0]
    for accept_prob in stored.accept_probs:
        reached *= accept_prob
        expected += reached
        computed.append(expected)
    for length, tokens in zip(lengths, stored.mean_tokens, strict=True):
        ratio = (tokens - 1.0) / computed[length] if computed[length] > 0.0 else 1.0
        factors[length - 1] = max(_MIN_CALIBRATION, ratio)
    return tuple(factors)
