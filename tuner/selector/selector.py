"""Chooses the setup of every round at run time, learns from what rounds report, and steps back to plain decoding.

It starts from a policy and what the policy's run measured, is pure (no I/O, no clock) and loads next to nothing, so any
server can hold one. How a policy is made, or an engine decodes, it must not know. Serving code:

    from profiles.engines.base import Round
    from tuner.policy.policy import read
    from tuner.selector.selector import Selector

    selector = Selector(read("policy.json"))
    for request in requests:
        while not request.done:
            pick = selector.choose(batch_size=1, context_length=request.context_length, domain=request.domain)
            started = time.perf_counter()
            proposed, accepted = decode_round(request, pick.setup)
            seconds = time.perf_counter() - started
            selector.observe(Round(pick, ((proposed, accepted),), seconds))

A batch runs one setup for all rows. Where its requests are of several domains, `domain` is None: the choice over all
domains answers, and learns. Beyond what was measured the pick is plain decoding, and nothing is learned.
"""

from __future__ import annotations

from threading import Lock

from profiles.records.errors import InputError
from tuner.selector.loss_budget import RESERVE, LossBudget
from tuner.selector.state import Places

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from profiles.engines.base import RoundDecision, RoundReport
    from tuner.policy.policy import Policy
    from tuner.selector.operating_point import Option, Place

SNAPSHOT_VERSION = 1
PROBE_SHARE = 0.0025  # of all tokens: what probes may lose against the setup in use
PROBE_ROUNDS = 4
FIRST_CREDIT, MOST_CREDIT = 8.0, 32.0  # tokens
PLAN_EVERY = 24  # rounds between two looks for something to probe, more or less
PLAIN_MEMORY = 256  # rounds after which the time of plain decoding is looked at again
KNOWN_QUESTIONS = 4096
SHORTEST_S, LONGEST_S = 1e-9, 1e6  # of a round; others are impossible
_NUMBERS, _ROWS = (float, int), (tuple, list)
HICCUP = 4.0  # a round is booked as at most so many times longer than usual


class Selector:
    """Holds one policy and what was learned since; threads may share it.

    `scores`: the engine can score a draft over text that is there, which is asked for in place of probing it. `seed`
    shifts the moments of probes; the same reports in the same order give the same picks. `num_refused` counts reports
    that were impossible. Raises PolicyError or InputError as `Places` does.
    """

    def __init__(self, policy: Policy, *, seed: int = 0, scores: bool = False) -> None:
        self._places = Places(policy)
        self._scores = scores
        self._lock = Lock()
        self._known: dict[tuple[int, int | None, str | None, float], Place | None] = {}
        self._ledger = LossBudget()
        self._now = 0
        self._credit = FIRST_CREDIT
        self._random = seed % 2**64
        self._plan_at = PROBE_ROUNDS
        self._burst: _Burst | None = None
        self.num_refused = 0

    @property
    def policy(self) -> Policy:
        return self._places.policy

    @property
    def num_rounds(self) -> int:
        """Rounds that were heard of."""
        return self._now

    @property
    def loss(self) -> float:
        """What the latest rounds lost against plain decoding, in plain rounds (see `LossBudget`)."""
        return self._ledger.loss

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> RoundDecision:
        """The setup of the next round; `context_length` in tokens of prompt plus output, None when it is not known.

        The measured point that answers is found as by `Policy.look_up`. Raises: InputError: an impossible value.
        """
        question = batch_size, context_length, domain, temperature
        with self._lock:
            place = self._known[question] if question in self._known else self._find(question)
            if place is None:
                return self._places.uncovered
            burst = self._burst
            if burst is not None and burst.place is place:
                if burst.left > 0 and burst.worst <= self._ledger.allowed():
                    burst.left -= 1
                    return burst.pick
                self._burst = None
            if self._now >= self._plan_at and place.options:
                pick = self._plan(place)
                if pick is not None:
                    return pick
            allowed = self._ledger.allowed(place.gain)
            return place.pick(allowed, allowed * RESERVE)

    def observe(self, report: RoundReport) -> bool:
        """Learns from a round that was run as picked; False: the report is impossible, it was refused and counted."""
        pick = report.pick
        setup = pick.score if report.scored else pick.setup
        with self._lock:
            place = self._places.by_key.get(pick[2:6])
            if (
                setup is None
                or (place is None and pick.covered)
                or not _is_possible(setup.length, report.rows, report.seconds)
            ):
                self.num_refused += 1
                return False
            if place is None or not place.options:
                return True
            found = place.find(setup) if setup.length else None
            if setup.length and found is None:
                self.num_refused += 1
                return False
            self._now += 1
            if found is not None and report.scored:
                self._learn_scored(place, found, report)
            else:
                self._learn(place, found, report)
            return True

    def replace(self, policy: Policy) -> None:
        """Goes on with another policy, and with what was learned of drafts and domains that it knows too.

        It is prepared beside the one in use, so that nobody waits for it. Raises as the selector itself.
        """
        places = Places(policy)
        with self._lock:
            places.take_over(self._places, self._now)
            self._change_to(places)

    def snapshot(self) -> dict[str, Any]:
        """All that was learned, as JSON values; `restore` takes it up again, in another process too."""
        with self._lock:
            return {
                "version": SNAPSHOT_VERSION,
                "policy": self._places.digest,  # worked out when the policy came in
                "counters": [self._now, self._credit, self._random, self._plan_at, self.num_refused],
                "ledger": self._ledger.snapshot(),
                "places": self._places.snapshot(self._now),
            }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot. Raises InputError: of another policy or version, or damaged; nothing is changed."""
        version = snapshot.get("version")
        if version != SNAPSHOT_VERSION:
            raise InputError(f"snapshot version {version!r}: this draftpick knows {SNAPSHOT_VERSION}")
        places, loss_budget = Places(self.policy), LossBudget()
        if snapshot.get("policy") != places.digest:
            raise InputError("the snapshot was made under another policy: restore it before `replace`")
        try:
            now, credit, random, plan_at, num_refused = snapshot["counters"]
            loss_budget.restore(snapshot["ledger"])
            places.restore(snapshot["places"], int(now))
            if not -MOST_CREDIT <= credit <= 2 * MOST_CREDIT:
                raise ValueError(f"credit {credit}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"the snapshot is damaged: {type(error).__name__} {error}") from error
        with self._lock:
            self._now, self._credit, self._random = int(now), float(credit), int(random) % 2**64
            self._plan_at, self.num_refused, self._ledger = int(plan_at), int(num_refused), loss_budget
            self._change_to(places)

    def _change_to(self, places: Places) -> None:
        self._places, self._burst = places, None
        self._known.clear()

    def _find(self, question: tuple[int, int | None, str | None, float]) -> Place | None:
        place = self._places.find(question)
        if len(self._known) >= KNOWN_QUESTIONS:
            self._known.clear()
        self._known[question] = place
        return place

    def _plan(self, place: Place) -> RoundDecision | None:
        """A probe to run now, if one is worth it and the budget has what it is likely to lose against the setup in use.

        Plain decoding first, where its time was not heard of lately; then the draft that may be faster and was probed
        longest ago, at its best length.
        """
        self._random = (self._random * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX
        self._plan_at = self._now + PLAN_EVERY // 2 + (self._random >> 33) % PLAN_EVERY
        rate, pace = place.rate, place.plain.paces[0]
        if place.option is not None and (not pace.factor or self._now - pace.last >= PLAIN_MEMORY):
            likely = min(MOST_CREDIT, PROBE_ROUNDS * place.gain)
            if likely <= self._credit:
                return self._begin(place, place.plain_pick, 0.0)
        option = place.curious(self._now)
        if option is None:
            return None
        likely = option.times.catch_up_s * rate
        scored = self._scores and place.option is None and option.can_be_scored and not place.plain_pick.temperature
        if not scored:
            tokens = option.acceptance_model.tokens[option.best]
            likely += PROBE_ROUNDS * max(0.0, tokens * (rate / option.rate - 1.0))
        worst = 0.0 if scored else place.worst(option, option.best)
        risked = worst + (0.0 if option is place.ran else place.catch_up(option))
        if likely > self._credit or worst > self._ledger.allowed() or risked > self._ledger.allowed() * RESERVE:
            return None
        option.last_probe = self._now
        if scored:
            return place.plain_pick._replace(score=option.picks[-1].setup)
        return self._begin(place, option.picks[option.best], worst)

    def _begin(self, place: Place, pick: RoundDecision, worst: float) -> RoundDecision:
        self._burst = _Burst(place, pick._replace(probe=True), worst)
        return self._burst.pick

    def _learn(self, place: Place, found: tuple[Option, int] | None, report: RoundReport) -> None:
        """From a round of `found`, a draft and the place of its length, or of plain decoding."""
        pick, rows, seconds, _ = report
        now, widest, kept = self._now, 0, 0
        for proposed, accepted in rows:
            kept += accepted
            widest = max(widest, proposed)
        tokens = 1.0 + kept / len(rows)
        if found is None:
            option, lost, usual_s = None, 0.0, place.plain_s
            place.plain.paces[0].hear(seconds / place.plain.seconds[0], now, 1.0)
        else:
            option, length = found
            option.heard = True
            stored_s = option.times.seconds[widest]
            plain_low_s = place.plain_low_s  # before this round is heard of
            pace = option.times.paces[length]
            usual_s = stored_s * (pace.factor or place.shared)
            if option is not place.ran and option.times.catch_up_s:  # it caught up first
                usual_s += option.times.catch_up_s
            elif pace.hear(seconds / stored_s, now, place.shared):
                place.plain.paces[0].last = self._plan_at = now - PLAIN_MEMORY  # is it the machine?
            option.acceptance_model.observe(rows, length, now)
            # a hiccup of the machine would have held up plain decoding too
            lost = min(seconds, HICCUP * usual_s) / plain_low_s - tokens
        place.ran = option
        self._ledger.add(lost)
        if self._credit < MOST_CREDIT:
            self._credit += PROBE_SHARE * tokens
        if pick.probe:
            self._spend(min(seconds, HICCUP * usual_s) * place.rate - tokens)
        place.review(option, now)

    def _learn_scored(self, place: Place, found: tuple[Option, int], report: RoundReport) -> None:
        """From the rounds that a draft would have had over text that is there."""
        option, length = found
        seconds = min(report.seconds, HICCUP * max(place.plain_s, option.times.catch_up_s))
        option.heard = True
        option.acceptance_model.observe(report.rows, length, self._now)
        self._ledger.charge(seconds / place.plain_low_s)
        self._spend(seconds * place.rate)
        place.ran = option  # it has taken in what it missed
        place.review(option, self._now)

    def _spend(self, lost: float) -> None:
        """Takes the tokens that a probe lost from the budget."""
        self._credit = max(-MOST_CREDIT, self._credit - max(0.0, lost))


class _Burst:
    """A few rounds in a row of one probe; `left` are still to be picked."""

    __slots__ = ("left", "pick", "place", "worst")

    def __init__(self, place: Place, pick: RoundDecision, worst: float) -> None:
        self.place = place
        self.pick = pick
        self.worst = worst
        self.left = PROBE_ROUNDS - 1


def _is_possible(length: int, rows: object, seconds: object) -> bool:
    """Whether rounds asked for `length` tokens can have gone so, in so many seconds."""
    if not isinstance(seconds, _NUMBERS) or not SHORTEST_S < seconds < LONGEST_S:
        return False
    if not isinstance(rows, _ROWS) or not rows:
        return False
    for row in rows:
        if not isinstance(row, _ROWS) or len(row) != 2:
            return False
        proposed, accepted = row
        if type(proposed) is not int or type(accepted) is not int or not 0 <= accepted <= proposed <= length:
            return False  # bool and the whole numbers of arrays are no int
    return True
