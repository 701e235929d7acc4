"""How far a draft's proposals are kept on a domain: a posterior by position that starts at stored evidence.

Rounds are counted as they happen, so a position behind a rejection was never seen and is not counted. Plain loops over
short lists, because they run once a round in serving code; it must not know times or other drafts.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tuner.policy.prior import Kept

PRIOR_ROUNDS = 64.0  # what stored evidence weighs at most, however much of it there is: the text may differ
HALF_LIFE = 1024.0  # rounds of the selector after which what was seen weighs half
SURPRISED_ROUNDS = 16.0  # what stored evidence weighs once rounds contradicted it
WINDOW = 32  # rounds that a surprise is noticed in
SURPRISE = 4.0  # standard errors of rounds drawn alone; rounds of one text are alike
_FADE = 1.0 - 1.0 / WINDOW
LEAST_SPREAD = 0.05
_LEAST = 1e-9
_LARGEST = 1e30


class AcceptanceModel:
    """Of one draft on one domain: `tokens[j]` of a mean round at `lengths[j]`, the target token included.

    `spreads[j]` is the variance of that number. `hit` is the share of rounds that propose anything; `weight` the rounds
    that the figures rest on. A share is (stored share x its weight + rounds that kept) / (weight + rounds that tested).
    What was seen fades as rounds of the selector go by, in use or not, so that the figures return to the stored ones.
    When about 32 rounds contradict the figures by 4 standard errors, either way, only those rounds are left and the
    stored evidence weighs 16 rounds, after another surprise 8, and so on; its weight then comes back at the rate at
    which the rest fades.
    """

    __slots__ = (
        "_drift", "_kept", "_last", "_most", "_next", "_prior", "_recent", "_scale",
        "_static", "_stored", "_tested", "_variance", "hit", "lengths", "spreads", "tokens",
    )  # fmt: skip

    def __init__(self, kept: Kept, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._prior = (kept.hit, *kept.keep)  # position 0: whether anything is proposed
        self._tested = [0.0] * len(self._prior)
        self._kept = [0.0] * len(self._prior)
        self._scale = 1.0  # what a round counts now: later rounds count more, instead of all others less
        self._most = self._stored = min(PRIOR_ROUNDS, max(1.0, kept.num_rounds))
        self._last = 0
        self._recent: list[tuple[int, int]] = []
        self._next = 0
        self._drift = self._variance = 0.0
        steps = [2.0 * position - 1.0 for position in range(1, len(self._prior))]
        self._static = tuple(zip(kept.keep, _calibration(kept, self.lengths), steps, strict=True))
        self.hit = kept.hit
        self.tokens, self.spreads = [1.0] * len(self.lengths), [0.0] * len(self.lengths)
        self.settle()

    @property
    def weight(self) -> float:
        """Rounds that the figures rest on, the stored ones included."""
        return self._stored + self._tested[0] / self._scale

    def observe(self, rows: Sequence[tuple[int, int]], place: int, now: int) -> None:
        """Counts (proposed, accepted) of rounds asked for `lengths[place]` tokens; `now`: rounds of the selector.

        The figures follow with the next `settle`.
        """
        self.forget(now)
        mean = self.tokens[place] - 1.0
        spread = max(self.spreads[place], LEAST_SPREAD)
        for proposed, accepted in rows:
            self._count(proposed, accepted)
            self._drift = self._drift * _FADE + accepted - mean
            self._variance = self._variance * _FADE * _FADE + spread
            if len(self._recent) < WINDOW:
                self._recent.append((proposed, accepted))
            else:
                self._recent[self._next] = proposed, accepted
                self._next = (self._next + 1) % WINDOW
        if self._drift * self._drift > SURPRISE * SURPRISE * self._variance:
            self._start_over()

    def forget(self, now: int) -> None:
        """Lets what was seen fade until `now`."""
        passed = now - self._last
        if passed > 0:
            self._last = now
            growth = 2.0 ** min(passed / HALF_LIFE, 64.0)
            self._scale *= growth
            self._stored = self._most - (self._most - self._stored) / growth
            if self._scale > _LARGEST:
                self._tested = [value / self._scale for value in self._tested]
                self._kept = [value / self._scale for value in self._kept]
                self._scale = 1.0

    def settle(self) -> None:
        """Works the figures out anew."""
        weight, accepted, squares = self._stored * self._scale, 0.0, 0.0
        kept, tested = iter(self._kept), iter(self._tested)
        survived = self.hit = (weight * self._prior[0] + next(kept)) / (weight + next(tested))
        tokens, spreads, number = self.tokens, self.spreads, 0  # written in place: nothing for the collector
        for (prior, calibration, step), held, tried in zip(self._static, kept, tested, strict=True):
            survived *= (weight * prior + held) / (weight + tried)
            accepted += survived
            squares += step * survived  # of the number accepted: the sum of (2 i - 1) x the share that reaches i
            if calibration:
                tokens[number] = 1.0 + accepted * calibration
                spreads[number] = squares - accepted * accepted
                number += 1

    def snapshot(self) -> dict[str, Any]:
        """What was learned, as JSON values."""
        return {
            "tested": list(self._tested),
            "kept": list(self._kept),
            "scale": self._scale,
            "stored": self._stored,
            "last": self._last,
            "recent": [list(one) for one in self._recent],
            "next": self._next,
            "drift": [self._drift, self._variance],
        }

    def restore(self, learned: Mapping[str, Any]) -> None:
        """Takes up what `snapshot` told, of beliefs with the same lengths."""
        self._tested, self._kept = list(learned["tested"]), list(learned["kept"])
        self._scale, self._stored = learned["scale"], learned["stored"]
        self._last, self._next = learned["last"], learned["next"]
        self._recent = [(proposed, accepted) for proposed, accepted in learned["recent"]]
        self._drift, self._variance = learned["drift"]
        counts = [*self._tested, *self._kept]
        if not (
            0.0 < self._stored < math.inf
            and 0.0 < self._scale < math.inf
            and 0.0 <= min(counts) <= max(counts) < math.inf
        ):
            raise ValueError("counts that cannot be")
        if len(counts) != 2 * len(self._prior) or not 0 <= self._next < WINDOW or len(self._recent) > WINDOW:
            raise ValueError("counts of other lengths")
        self.settle()

    def _count(self, proposed: int, accepted: int) -> None:
        tested, kept, scale = self._tested, self._kept, self._scale
        tested[0] += scale
        if proposed:
            kept[0] += scale
            for place in range(1, accepted + 1):
                tested[place] += scale
                kept[place] += scale
            if accepted < proposed:
                tested[accepted + 1] += scale

    def _start_over(self) -> None:
        """Keeps the latest rounds alone."""
        size = len(self._prior)
        self._tested, self._kept = [0.0] * size, [0.0] * size
        self._stored = min(SURPRISED_ROUNDS, self._stored / 2.0)
        self._drift, self._variance, self._scale = 0.0, 0.0, 1.0
        for proposed, accepted in self._recent:
            self._count(proposed, accepted)


def _calibration(kept: Kept, lengths: Sequence[int]) -> tuple[float, ...]:
    """By position: what the walk at that length accepted over what the shares give; 0 where it was no length.

    The shares are those of the longest rounds; shorter ones start elsewhere in the text.
    """
    factors = [0.0] * len(kept.keep)
    survived, accepted, sums = kept.hit, 0.0, [0.0]
    for share in kept.keep:
        survived *= share
        accepted += survived
        sums.append(accepted)
    for length, tokens in zip(lengths, kept.per_round, strict=True):
        factors[length - 1] = max(_LEAST, (tokens - 1.0) / sums[length]) if sums[length] > 0.0 else 1.0
    return tuple(factors)
