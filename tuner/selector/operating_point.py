"""One measured point at run time: what every draft would yield there now, and which setup is in use.

Joins beliefs about acceptance with stored round times and with what rounds really took. It must not know other points,
the account of losses or threads.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from profiles.engines.base import RoundDecision
    from profiles.records.core import Setup
    from tuner.selector.acceptance_model import AcceptanceModel

MARGIN = 0.03  # another draft must promise so much more than what is in use
LENGTH_MARGIN = 0.01  # and another length of the same draft
DWELL = 24  # rounds before the next change, but for stepping back to plain decoding
RETREAT_DWELL = 4
HORIZON = 64  # rounds in which a change must earn what catching up takes
SHARE = 1.0 / 16.0  # of the latest round in how long rounds are taken to last; the first ones count more
STORED_SHARE = 1.0 / 4.0
NOISE = 0.05**2  # of the logarithm of a round's time, until it is known
PLAIN_SHARE = 1.0 / 64.0  # the same of plain decoding, which all losses are held against
OFF, JUMP = math.log(1.2), 3  # a round alone counts as at most so much longer or shorter than the ones before it
CURIOUS = 2000  # rounds
MEMORY = 2048  # rounds of the selector for which a time is remembered


class Pace:
    """How much longer rounds of one setup last than stored: the exponential of a running mean of logarithms.

    `factor` is 0 while nothing was heard, or not for long. `least_share` is what the latest round counts at least; the
    stored time counts as four rounds. Three rounds in a row that are off by a fifth, to the same side, are a jump: from
    there on the stored time counts for nothing.
    """

    __slots__ = ("_least", "_log", "_off", "_share", "_spread", "factor", "last")

    def __init__(self, least_share: float) -> None:
        self._least = least_share
        self.factor = 0.0
        self.last = 0
        self._log = 0.0
        self._share = STORED_SHARE
        self._spread = NOISE
        self._off = 0

    @property
    def low(self) -> float:
        """The factor less a standard error."""
        return self.factor * (1.0 - math.sqrt(self._spread * self._share))

    def hear(self, ratio: float, now: int, start: float) -> bool:
        """A round took `ratio` times its stored seconds; `start` is what was assumed as long as nothing was known.

        True: it was the third of a jump.
        """
        if not self.factor:
            self._log, self._share, self._off = math.log(start), STORED_SHARE, 0
        beyond = math.log(ratio) - self._log
        side = (beyond > OFF) - (beyond < -OFF)
        self._off = self._off + side if side * self._off > 0 else side
        jumped = abs(self._off) >= JUMP
        if jumped:
            self._share, self._off = 1.0, 0
        else:
            beyond = min(max(beyond, -OFF), OFF)
            self._spread += SHARE * (beyond * beyond - self._spread)
        self._share = max(self._least, self._share / (1.0 + self._share))  # 1/2, 1/3, 1/4 ...
        self._log += self._share * beyond
        self.factor, self.last = math.exp(self._log), now
        return jumped

    def snapshot(self) -> list[float]:
        return [self.factor, self.last, self._log, self._share, self._spread, self._off]

    def restore(self, learned: Sequence[float]) -> None:
        if not all(math.isfinite(one) for one in learned):
            raise ValueError("times that are not finite")
        self.factor, last, self._log, self._share, self._spread, off = learned
        self.last, self._off = int(last), int(off)


class Times:
    """Rounds of one draft (or of plain decoding) at one batch and context: stored seconds, and paces by length.

    `seconds[p]`: the widest row proposes p tokens. `catch_up_s`: for text of half the context.
    """

    __slots__ = ("catch_up_s", "paces", "seconds")

    def __init__(self, seconds: Sequence[float], num_lengths: int, catch_up_s: float = 0.0) -> None:
        self.seconds = tuple(seconds)
        self.catch_up_s = catch_up_s
        share = PLAIN_SHARE if len(self.seconds) == 1 else SHARE
        self.paces = [Pace(share) for _ in range(num_lengths)]

    def snapshot(self) -> list[list[float]]:
        """The paces, as JSON values."""
        return [pace.snapshot() for pace in self.paces]

    def restore(self, learned: Sequence[Sequence[float]]) -> None:
        """Takes up what `snapshot` told."""
        for pace, one in zip(self.paces, learned, strict=True):
            pace.restore(one)


class Option:
    """One draft at a place: tokens per second of a row at every length, and the best length.

    Of the best length `rate` are its tokens per second, `error` their standard error, `cautious` the rate less that.
    """

    __slots__ = (
        "acceptance_model", "best", "cautious", "error", "heard",
        "last_probe", "picks", "rate", "rates", "rows", "shared",
        "times",
    )  # fmt: skip

    def __init__(
        self, picks: Sequence[RoundDecision], acceptance_model: AcceptanceModel, times: Times, rows: int
    ) -> None:
        self.picks = tuple(picks)
        self.acceptance_model = acceptance_model
        self.times = times
        self.rows = rows
        self.last_probe = 0
        self.heard = False  # of a round here, or of a scoring
        self.best = 0
        self.rate = self.cautious = self.error = 0.0
        self.rates = [0.0] * len(self.picks)
        self.shared = 1.0

    @property
    def can_be_scored(self) -> bool:
        """Whether one pass of it over text tells how far its proposals would have gone."""
        draft = self.picks[0].setup.draft
        return draft is not None and draft.kind in ("model", "early_exit")

    def round_s(self, length: int) -> float:
        """Seconds of a round of the `length`-th length in which the widest row proposes all of it."""
        return self.times.seconds[self.acceptance_model.lengths[length]] * (
            self.times.paces[length].factor or self.shared
        )

    def weigh(self, shared: float, now: int) -> None:
        """Works all figures out; `shared` is the pace of the setup in use, taken for lengths never heard of.

        A round in which no row proposes is a plain round with a look-up; with more rows that is rarer.
        """
        acceptance_model, seconds = self.acceptance_model, self.times.seconds
        proposing = acceptance_model.hit if self.rows == 1 else 1.0 - (1.0 - acceptance_model.hit) ** self.rows
        idle_s, best_rate = (1.0 - proposing) * seconds[0], 0.0
        self.shared = shared
        rates = self.rates  # written in place: nothing for the collector
        for number, (length, tokens, pace) in enumerate(
            zip(acceptance_model.lengths, acceptance_model.tokens, self.times.paces, strict=False)
        ):
            if pace.factor and now - pace.last > MEMORY:
                pace.factor = 0.0
            rate = tokens / ((idle_s + proposing * seconds[length]) * (pace.factor or shared))
            if rate > best_rate:
                best_rate, self.best = rate, number
            rates[number] = rate
        error = (
            math.sqrt(max(0.0, acceptance_model.spreads[self.best]) / acceptance_model.weight)
            / acceptance_model.tokens[self.best]
        )
        self.rate, self.cautious, self.error = best_rate, best_rate * (1.0 - error), best_rate * error


class Place:
    """The options at one (batch, context, domain, temperature), and which is in use: `option` None is plain decoding.

    Plain decoding is in use where nothing promises more by the margin, and it is stepped back to at once. What was not
    run here, only forecast, is not believed: it is probed first.
    """

    __slots__ = ("_by_setup", "_turn", "length", "option", "options", "plain", "plain_pick", "ran", "since")

    def __init__(
        self, plain_pick: RoundDecision, plain: Times, options: Sequence[Option], start: tuple[int, int] | None
    ) -> None:
        self.plain_pick = plain_pick
        self.plain = plain
        self.options = tuple(options)
        self.option = None if start is None else self.options[start[0]]
        if self.option is not None:
            self.option.heard = True  # the policy's own choice was run
        self.length = 0 if start is None else start[1]
        self.since = -DWELL
        self._turn = 0
        self.ran: Option | None = self.option
        self._by_setup = {
            id(pick.setup): (option, length) for option in self.options for length, pick in enumerate(option.picks)
        }
        self.weigh(0)

    @property
    def plain_s(self) -> float:
        """Seconds of a round of plain decoding, as they were heard last; until then at the pace of the setup in use."""
        return self.plain.seconds[0] * (self.plain.paces[0].factor or self.shared)

    @property
    def plain_low_s(self) -> float:
        """`plain_s` less a standard error: what a loss is held against, so that none is overlooked."""
        return self.plain.seconds[0] * (self.plain.paces[0].low or self.shared)

    @property
    def rate(self) -> float:
        """Tokens per second of a row in use."""
        return 1.0 / self.plain_s if self.option is None else self.option.rates[self.length]

    @property
    def gain(self) -> float:
        """Tokens that the setup in use yields in the time of a plain round, less the plain round's one."""
        return self.plain_s * self.rate - 1.0

    @property
    def shared(self) -> float:
        """The pace of the setup in use."""
        times, place = (self.plain, 0) if self.option is None else (self.option.times, self.length)
        return times.paces[place].factor or 1.0

    def pick(self, allowed: float, left: float) -> RoundDecision:
        """The setup in use, shortened until a round of it can lose at most `allowed` plain rounds.

        Catching up, before it is run again, may take what is `left` in all.
        """
        option = self.option
        if option is not None and (option is self.ran or self.catch_up(option) <= left):
            most_s = (1.0 + allowed) * self.plain_s  # a round yields one token at least
            for length in range(self.length, -1, -1):
                if option.round_s(length) <= most_s:
                    return option.picks[length]
        return self.plain_pick

    def worst(self, option: Option, length: int) -> float:
        """Plain rounds that a round can lose: all proposals rejected."""
        return option.round_s(length) / self.plain_s - 1.0

    def catch_up(self, option: Option) -> float:
        """Plain rounds that the draft's catching up takes."""
        return option.times.catch_up_s / self.plain_s

    def find(self, setup: Setup) -> tuple[Option, int] | None:
        """The option and the place of the length of a setup; None: it is none of this place's."""
        found = self._by_setup.get(id(setup))
        if found is None:  # it may be equal to one that was handed out
            every = ((option, length) for option in self.options for length in range(len(option.picks)))
            found = next((one for one in every if one[0].picks[one[1]].setup == setup), None)
        return found

    def curious(self, now: int) -> Option | None:
        """The option not in use that may be faster than what is; the one probed longest ago.

        It may be so much faster than its rate as is a standard error, and one more for every 2,000 rounds since it was
        probed: texts change.
        """
        rate, found = self.rate, None
        for option in self.options:
            if option is not self.option and (found is None or option.last_probe < found.last_probe):
                error = option.error * (1.0 + (now - option.last_probe) / CURIOUS)
                if option.rate + error > rate:
                    found = option
        return found

    def weigh(self, now: int) -> None:
        """Works out the figures of all options."""
        for option in self.options:
            option.weigh(self.shared, now)

    def snapshot(self) -> dict[str, Any]:
        """What is in use and what was probed, as JSON values."""
        return {
            "option": None if self.option is None else self.options.index(self.option),
            "ran": None if self.ran is None else self.options.index(self.ran),
            "length": self.length,
            "since": self.since,
            "turn": self._turn,
            "options": [[option.last_probe, option.heard] for option in self.options],
        }

    def restore(self, learned: Mapping[str, Any]) -> None:
        """Takes up what `snapshot` told; `weigh` has to follow, once beliefs and times are there too."""
        self.option = None if learned["option"] is None else self.options[learned["option"]]
        self.ran = None if learned["ran"] is None else self.options[learned["ran"]]
        self.length, self.since, self._turn = int(learned["length"]), int(learned["since"]), int(learned["turn"])
        for option, (last_probe, heard) in zip(self.options, learned["options"], strict=True):
            option.last_probe, option.heard = int(last_probe), bool(heard)
        if not 0 <= self.length < len(self.option.picks if self.option is not None else (0,)):
            raise ValueError("a length that is not there")

    def review(self, heard: Option | None, now: int) -> None:
        """After a round: weighs what was heard of, every other time another option, and changes what is in use."""
        options = self.options
        if not options:
            return
        turn = self._turn = (self._turn + 1) % (2 * len(options))
        option = options[turn // 2] if heard is None or turn % 2 else heard
        option.acceptance_model.forget(now)
        option.acceptance_model.settle()
        option.weigh(self.shared, now)
        rate = self.rate
        if self.option is not None and now - self.since >= RETREAT_DWELL and self.plain_s * rate <= 1.0:
            self._use(None, 0, now)
        elif now - self.since >= DWELL:
            same = option is self.option
            promised, margin = (option.rate, LENGTH_MARGIN) if same else (option.cautious, MARGIN)
            if promised > rate * (1.0 + margin) and (same or (option.heard and self._pays(option, promised / rate))):
                self._use(option, option.best, now)

    def _pays(self, option: Option, gain: float) -> bool:
        """Whether what a draft model must take in first is earned back soon."""
        round_s = option.acceptance_model.tokens[option.best] / option.rate
        return bool((gain - 1.0) * HORIZON * round_s > option.times.catch_up_s)

    def _use(self, option: Option | None, length: int, now: int) -> None:
        self.option, self.length, self.since = option, length, now
