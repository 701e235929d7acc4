"""What a simulated server played, round by round, and how it did against plain decoding in the same conditions.

Arithmetic on records; how rounds came about it must not know.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from profiles.terms import Setup


class Played(NamedTuple):
    """A round that was played.

    `seconds`: the round, the prefills its rows waited for and the scoring that was asked for. `plain_s`: what plain
    decoding would have taken for as many tokens of that batch, on the machine as it was in that round, which is
    `slowed` times slower than usual by noise and weather. `phase`: of the stream.
    """

    setup: Setup
    domain: str | None
    num_rows: int
    tokens: int
    seconds: float
    plain_s: float
    slowed: float
    probe: bool
    phase: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All rounds of a stream. A stream of outputs of one token has none, and no figures."""

    rounds: tuple[Played, ...]

    @property
    def tokens(self) -> int:
        """Without the first of every output, which comes from its prefill."""
        return sum(one.tokens for one in self.rounds)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.rounds)

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def over_plain(self) -> float:
        """Seconds plain decoding would have taken in these very conditions, over those it took."""
        return sum(one.plain_s for one in self.rounds) / self.seconds

    def worst_window(self, size: int) -> float:
        """The least `over_plain` of `size` rounds in a row, in seconds of the machine as it usually is.

        A spike would give the few rounds that it happens to hit the weight of many, though in the long run it hits
        plain decoding as often. All rounds are one window when there are no more.
        """
        seconds = list(accumulate((one.seconds / one.slowed for one in self.rounds), initial=0.0))
        plain_s = list(accumulate((one.plain_s / one.slowed for one in self.rounds), initial=0.0))
        size = min(size, len(self.rounds))
        starts = range(len(self.rounds) - size + 1)
        return min((plain_s[at + size] - plain_s[at]) / (seconds[at + size] - seconds[at]) for at in starts)
