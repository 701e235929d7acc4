"""One operating point at run time: what every draft would yield there now, and which setup is in use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from profiles.engines.base import RoundDecision
from profiles.records.core import Setup
from tuner.selector.acceptance_model import AcceptanceModel
from tuner.selector.round_time import RoundTimeModel

DRAFT_SWITCH_GAIN = 0.03  # another draft must promise so much more than the setup in use
LENGTH_SWITCH_GAIN = 0.01  # and another length of the same draft
MIN_ROUNDS_IN_USE = 24  # before the next change, but for returning to plain decoding
MIN_ROUNDS_BEFORE_PLAIN = 4
PAYBACK_ROUNDS = 64  # in which a change must earn the time of catching up
ERROR_GROWTH_ROUNDS = 2000  # since the last probe, for one more standard error of what a draft may yield
TIME_MEMORY_ROUNDS = 2048  # of the selector, after which an observed round time is forgotten
MAX_ROUND_RATIO = 4.0  # a round counts as at most so many times longer than expected


class RoundOutcome(NamedTuple):
    """What a round yielded per row, what it took (capped), and its loss in plain rounds; `jumped`: see `TimeFactor`."""

    tokens: float
    seconds: float
    loss: float
    jumped: bool


@dataclass(slots=True, eq=False)
class DraftOption:
    """One draft at an operating point: tokens per second of a row at every length, and the best length.

    `rate` is that of the best length, `error` its standard error, `cautious_rate` the rate less the error. `was_run`:
    a round of it was run here; what was only forecast is probed first. `fallback_factor`: the time factor of the setup
    in use, taken for lengths that were not run lately.
    """

    decisions: tuple[RoundDecision, ...]  # one for every length
    acceptance: AcceptanceModel
    times: RoundTimeModel
    num_rows: int
    last_probe: int = 0
    was_run: bool = False
    best: int = 0
    rate: float = 0.0
    cautious_rate: float = 0.0
    error: float = 0.0
    fallback_factor: float = 1.0
    rates: list[float] = field(default_factory=list)

    def round_s(self, index: int) -> float:
        """Seconds of a round at the `index`-th length in which the widest row proposes all of it."""
        factor = self.times.factors[index].value or self.fallback_factor
        return self.times.seconds[self.acceptance.lengths[index]] * factor

    def update(self, fallback_factor: float, now: int) -> None:
        """Recomputes all figures."""
        acceptance, seconds = self.acceptance, self.times.seconds
        # a round in which no row proposes is a plain round with a look-up; with more rows that is rarer
        propose_prob = acceptance.propose_prob
        any_proposes = propose_prob if self.num_rows == 1 else 1.0 - (1.0 - propose_prob) ** self.num_rows
        idle_s, best_rate = (1.0 - any_proposes) * seconds[0], 0.0
        self.fallback_factor = fallback_factor
        self.rates.clear()
        for length, tokens, factor in zip(acceptance.lengths, acceptance.mean_tokens, self.times.factors, strict=False):
            if factor.value and now - factor.last > TIME_MEMORY_ROUNDS:
                factor.value = 0.0
            rate = tokens / ((idle_s + any_proposes * seconds[length]) * (factor.value or fallback_factor))
            if rate > best_rate:
                best_rate, self.best = rate, len(self.rates)
            self.rates.append(rate)
        variance = max(0.0, acceptance.variances[self.best])
        error = math.sqrt(variance / acceptance.weight) / acceptance.mean_tokens[self.best]
        self.rate, self.cautious_rate, self.error = best_rate, best_rate * (1.0 - error), best_rate * error


class PointState:
    """The options at one operating point and the setup in use; `current` None is plain decoding.

    Plain decoding is in use where no draft promises a margin over it, and it returns at once.

    Args:
        start: the option and the index of its length to begin with; None: plain decoding.
    """

    def __init__(
        self,
        plain_decision: RoundDecision,
        plain: RoundTimeModel,
        options: Sequence[DraftOption],
        start: tuple[DraftOption, int] | None,
    ) -> None:
        self.plain_decision = plain_decision
        self.plain = plain
        self.options = tuple(options)
        self.current: DraftOption | None = None
        self.index = 0
        if start is not None:
            self.current, self.index = start
        if self.current is not None:
            self.current.was_run = True  # the policy's own choice was measured
        self.last_run = self.current
        self.switched_at = -MIN_ROUNDS_IN_USE
        self._turn = 0
        self._by_id = {id(decision.setup): (option, index) for option, index, decision in self._decisions()}
        self.update(0)

    @property
    def current_factor(self) -> float:
        """The time factor of the setup in use."""
        times, index = (self.plain, 0) if self.current is None else (self.current.times, self.index)
        return times.factors[index].value or 1.0

    @property
    def plain_s(self) -> float:
        """Seconds of a plain round."""
        return self.plain.seconds[0] * (self.plain.factors[0].value or self.current_factor)

    @property
    def plain_low_s(self) -> float:
        """`plain_s` less a standard error: losses are measured against it, so that none is overlooked."""
        return self.plain.seconds[0] * (self.plain.factors[0].low or self.current_factor)

    @property
    def rate(self) -> float:
        """Tokens per second of a row with the setup in use."""
        return 1.0 / self.plain_s if self.current is None else self.current.rates[self.index]

    @property
    def gain(self) -> float:
        """Tokens that the setup in use yields in the time of a plain round, less one."""
        return self.plain_s * self.rate - 1.0

    def decide(self, max_round_loss: float, max_catch_up: float) -> RoundDecision:
        """The setup in use, shortened until a round can lose at most `max_round_loss` plain rounds.

        Args:
            max_catch_up: plain rounds that catching up may take, before a draft that was not run last is run.
        """
        option = self.current
        if option is not None and (option is self.last_run or self.catch_up_rounds(option) <= max_catch_up):
            max_s = (1.0 + max_round_loss) * self.plain_s  # a round yields one token at least
            for index in range(self.index, -1, -1):
                if option.round_s(index) <= max_s:
                    return option.decisions[index]
        return self.plain_decision

    def worst_loss(self, option: DraftOption) -> float:
        """Plain rounds that a round at the option's best length loses when all proposals are rejected."""
        return option.round_s(option.best) / self.plain_s - 1.0

    def catch_up_rounds(self, option: DraftOption) -> float:
        """Plain rounds that the draft's catching up takes."""
        return option.times.catch_up_s / self.plain_s

    def find(self, setup: Setup) -> tuple[DraftOption, int] | None:
        """The option and the index of the length of a setup; None: it is not an option here."""
        option_and_index = self._by_id.get(id(setup))  # fast for setups that were handed out; others may equal one
        if option_and_index is None:
            equal = ((option, index) for option, index, decision in self._decisions() if decision.setup == setup)
            return next(equal, None)
        return option_and_index

    def to_probe(self, now: int) -> DraftOption | None:
        """Of the options that may be faster than the setup in use, the one probed longest ago.

        An option may be faster than its rate by a standard error, and one more for every 2,000 rounds since its last
        probe, because texts change.
        """
        rate, chosen = self.rate, None
        for option in self.options:
            if option is not self.current and (chosen is None or option.last_probe < chosen.last_probe):
                error = option.error * (1.0 + (now - option.last_probe) / ERROR_GROWTH_ROUNDS)
                if option.rate + error > rate:
                    chosen = option
        return chosen

    def observe_plain(self, seconds: float, now: int) -> RoundOutcome:
        """Learns from a round of plain decoding."""
        expected_s = self.plain_s
        self.plain.factors[0].observe(seconds / self.plain.seconds[0], now, expected=1.0)
        self.last_run = None
        return RoundOutcome(tokens=1.0, seconds=min(seconds, MAX_ROUND_RATIO * expected_s), loss=0.0, jumped=False)

    def observe_draft(
        self, option: DraftOption, index: int, rows: Sequence[tuple[int, int]], seconds: float, *, now: int
    ) -> RoundOutcome:
        """Learns from a round of an option at its `index`-th length; `rows` are (proposed, accepted)."""
        tokens = 1.0 + sum(accepted for _, accepted in rows) / len(rows)
        stored_s = option.times.seconds[max(proposed for proposed, _ in rows)]
        factor, plain_low_s = option.times.factors[index], self.plain_low_s
        expected_s = stored_s * (factor.value or self.current_factor)
        jumped = False
        if option is not self.last_run and option.times.catch_up_s:
            expected_s += option.times.catch_up_s  # it caught up first, so the time tells nothing of a usual round
        else:
            jumped = factor.observe(seconds / stored_s, now, expected=self.current_factor)
        option.acceptance.observe(rows, index, now)
        option.was_run = True
        self.last_run = option
        capped_s = min(seconds, MAX_ROUND_RATIO * expected_s)  # a stall of the machine would delay plain decoding too
        return RoundOutcome(tokens=tokens, seconds=capped_s, loss=capped_s / plain_low_s - tokens, jumped=jumped)

    def review(self, observed: DraftOption | None, now: int) -> None:
        """After a round: updates the option observed, or every other time one in turn, and may change the setup."""
        if not self.options:
            return
        turn = self._turn = (self._turn + 1) % (2 * len(self.options))
        option = self.options[turn // 2] if observed is None or turn % 2 else observed
        option.acceptance.decay(now)
        option.acceptance.update()
        option.update(self.current_factor, now)
        in_use = now - self.switched_at
        if self.current is not None and in_use >= MIN_ROUNDS_BEFORE_PLAIN and self.gain <= 0.0:
            self._use(None, 0, now)
        elif in_use >= MIN_ROUNDS_IN_USE and self._should_switch(option):
            self._use(option, option.best, now)

    def update(self, now: int) -> None:
        """Recomputes the figures of all options."""
        for option in self.options:
            option.update(self.current_factor, now)

    def snapshot(self) -> dict[str, Any]:
        """What is in use and was probed, as JSON values."""
        return {
            "current": None if self.current is None else self.options.index(self.current),
            "last_run": None if self.last_run is None else self.options.index(self.last_run),
            "index": self.index,
            "switched_at": self.switched_at,
            "turn": self._turn,
            "options": [[option.last_probe, option.was_run] for option in self.options],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Takes over a snapshot; call `update` once acceptance and times are restored. Raises ValueError."""
        current, last_run = snapshot["current"], snapshot["last_run"]
        self.current = None if current is None else self.options[current]
        self.last_run = None if last_run is None else self.options[last_run]
        self.index, self.switched_at = int(snapshot["index"]), int(snapshot["switched_at"])
        self._turn = int(snapshot["turn"])
        for option, (last_probe, was_run) in zip(self.options, snapshot["options"], strict=True):
            option.last_probe, option.was_run = int(last_probe), bool(was_run)
        if not 0 <= self.index < (1 if self.current is None else len(self.current.decisions)):
            raise ValueError("a length that the option does not have")

    def _decisions(self) -> Iterator[tuple[DraftOption, int, RoundDecision]]:
        for option in self.options:
            for index, decision in enumerate(option.decisions):
                yield option, index, decision

    def _should_switch(self, option: DraftOption) -> bool:
        rate = self.rate
        if option is self.current:
            return option.rate > rate * (1.0 + LENGTH_SWITCH_GAIN)
        if not option.was_run or option.cautious_rate <= rate * (1.0 + DRAFT_SWITCH_GAIN):
            return False
        round_s = option.acceptance.mean_tokens[option.best] / option.rate
        return (option.cautious_rate / rate - 1.0) * PAYBACK_ROUNDS * round_s > option.times.catch_up_s

    def _use(self, option: DraftOption | None, index: int, now: int) -> None:
        self.current, self.index, self.switched_at = option, index, now
