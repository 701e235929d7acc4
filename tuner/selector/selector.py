"""Chooses the setup of every round at run time, learns from what rounds report, and returns to plain decoding.

It starts from a policy and the measurements behind it, and does no I/O and reads no clock, so any server can hold one.
Serving code:

    from tuner.selector import RoundReport, Selector, read_policy

    selector = Selector(read_policy("policy.json"))
    for request in requests:
        while not request.done:
            decision = selector.choose(batch_size=1, context_length=request.context_length, domain=request.domain)
            started = time.perf_counter()
            proposed, accepted = decode_round(request, decision.setup)
            seconds = time.perf_counter() - started
            selector.observe(RoundReport(decision, ((proposed, accepted),), seconds))

A batch runs one setup for all rows. When its requests are of several domains, pass `domain=None`: the choice over all
domains answers, and learns. Beyond what was measured the setup is plain decoding, and nothing is learned.
"""

from collections.abc import Collection, Mapping
from threading import Lock
from typing import Any

from profiles.engines.base import RoundDecision, RoundReport
from profiles.records.errors import InputError
from tuner.policy.policy import Policy
from tuner.selector.loss_budget import WINDOW, LossBudget
from tuner.selector.operating_point import DraftOption, PointState
from tuner.selector.state import SelectorState

SNAPSHOT_VERSION = 2  # 1 had other keys
PROBE_TOKEN_SHARE = 0.0025  # of all tokens: what probes may lose against the setup in use
INITIAL_PROBE_CREDIT, MAX_PROBE_CREDIT = 8.0, 32.0  # tokens
PROBE_ROUNDS = 4
PROBE_CHECK_ROUNDS = 24  # between two looks for something to probe, on average
PLAIN_TIME_MAX_AGE = 256  # rounds after which the time of plain decoding is probed again
MIN_ROUND_S, MAX_ROUND_S = 1e-9, 1e6


class Selector:
    """Decides the setup of every round by one policy and what was learned since. Threads may share it.

    The same reports in the same order give the same decisions. `num_refused` counts impossible reports.

    Args:
        drafts: names of the drafts that the engine has loaded; None: it can run all of the policy's.
        loss_window: rounds of which speculation loses at most 1.2 % in a row; a longer window interrupts setups that
            gain little less often.
        seed: shifts the moments of probes.

    Raises:
        InputError: the policy holds a number that is not finite, or the window is empty.
    """

    def __init__(
        self, policy: Policy, *, drafts: Collection[str] | None = None, loss_window: int = WINDOW, seed: int = 0
    ) -> None:
        self._state = SelectorState(policy, drafts)
        self._lock = Lock()
        self._loss_budget = LossBudget(loss_window)
        self._now = 0
        self._probe_credit = INITIAL_PROBE_CREDIT
        self._random = seed % 2**64
        self._next_probe_check = PROBE_ROUNDS
        self._probe: _Probe | None = None
        self.num_refused = 0

    @property
    def policy(self) -> Policy:
        return self._state.policy

    @property
    def num_rounds(self) -> int:
        """Rounds that were learned from."""
        return self._now

    @property
    def loss(self) -> float:
        """What the latest rounds lost against plain decoding, in plain rounds; see `LossBudget`."""
        return self._loss_budget.loss

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> RoundDecision:
        """The setup of the next round, at the measured operating point that `Policy.look_up` finds.

        Args:
            context_length: tokens of prompt and output; None: not known.

        Raises:
            InputError: an impossible value.
        """
        with self._lock:
            point = self._state.find(batch_size, context_length, domain, temperature)
            if point is None:
                return self._state.uncovered
            probe = self._probe
            if probe is not None and probe.point is point:
                if probe.rounds_left > 0 and probe.worst_loss <= self._loss_budget.allowed():
                    probe.rounds_left -= 1
                    return probe.decision
                self._probe = None
            if self._now >= self._next_probe_check and point.options:
                self._probe = self._plan_probe(point)
                if self._probe is not None:
                    return self._probe.decision
            gain = point.gain
            return point.decide(self._loss_budget.allowed(gain), max_catch_up=self._loss_budget.left(gain))

    def observe(self, report: RoundReport) -> bool:
        """Learns from a round that was run as decided. Returns False for an impossible report: it is only counted."""
        decision = report.decision
        setup = decision.setup
        key = decision.batch_size, decision.context_length, decision.domain, decision.temperature
        with self._lock:
            point = self._state.points.get(key)
            possible = _is_possible(report, setup.length)
            if not possible or (point is None and decision.covered):
                self.num_refused += 1
                return False
            if point is None or not point.options:
                return True
            drafted = point.find(setup) if setup.length else None
            if setup.length and drafted is None:
                self.num_refused += 1
                return False
            self._now += 1
            self._learn(point, drafted, report)
            return True

    def replace(self, policy: Policy) -> None:
        """Switches to another policy and keeps what was learned of drafts and domains that both have.

        The new state is prepared beside the one in use, so nobody waits for it. Raises as the constructor.
        """
        state = SelectorState(policy, self._state.drafts)
        with self._lock:
            state.take_over(self._state, self._now)
            self._state, self._probe = state, None

    def snapshot(self) -> dict[str, Any]:
        """All that was learned, as JSON values for `restore`, in another process too."""
        with self._lock:
            return {
                "version": SNAPSHOT_VERSION,
                "policy": self._state.digest,
                "num_rounds": self._now,
                "probe_credit": self._probe_credit,
                "random": self._random,
                "next_probe_check": self._next_probe_check,
                "num_refused": self.num_refused,
                "loss_budget": self._loss_budget.snapshot(),
                "state": self._state.snapshot(self._now),
            }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot.

        Raises:
            InputError: it is of another policy or version, or damaged; nothing is changed.
        """
        version = snapshot.get("version")
        if version != SNAPSHOT_VERSION:
            raise InputError(f"snapshot version {version!r}: this draftpick reads version {SNAPSHOT_VERSION}")
        state = SelectorState(self.policy, self._state.drafts)
        loss_budget = LossBudget(self._loss_budget.window)
        if snapshot.get("policy") != state.digest:
            raise InputError("the snapshot was made under another policy: restore it before `replace`")
        try:
            now, random = int(snapshot["num_rounds"]), int(snapshot["random"]) % 2**64
            next_probe_check, num_refused = int(snapshot["next_probe_check"]), int(snapshot["num_refused"])
            probe_credit = float(snapshot["probe_credit"])
            loss_budget.restore(snapshot["loss_budget"])
            state.restore(snapshot["state"], now)
            if not -MAX_PROBE_CREDIT <= probe_credit <= 2 * MAX_PROBE_CREDIT:
                raise ValueError(f"probe credit {probe_credit}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"the snapshot is damaged: {type(error).__name__} {error}") from error
        with self._lock:
            self._state, self._probe, self._loss_budget = state, None, loss_budget
            self._now, self._random, self._probe_credit = now, random, probe_credit
            self._next_probe_check, self.num_refused = next_probe_check, num_refused

    def _plan_probe(self, point: PointState) -> "_Probe | None":
        """A probe to run now, if one is worth it and its likely loss against the setup in use can be paid.

        Plain decoding first, when its time was not observed lately; then the draft that may be faster and was probed
        longest ago, at its best length.
        """
        self._random = (self._random * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX
        self._next_probe_check = self._now + PROBE_CHECK_ROUNDS // 2 + (self._random >> 33) % PROBE_CHECK_ROUNDS
        plain_time = point.plain.factors[0]
        is_old = not plain_time.value or self._now - plain_time.last >= PLAIN_TIME_MAX_AGE
        affordable = min(MAX_PROBE_CREDIT, PROBE_ROUNDS * point.gain) <= self._probe_credit
        if point.current is not None and is_old and affordable:
            return _Probe(point, point.plain_decision, 0.0)
        option = point.to_probe(self._now)
        if option is None:
            return None
        tokens_lost = option.acceptance.mean_tokens[option.best] * (point.rate / option.rate - 1.0)
        likely_loss = option.times.catch_up_s * point.rate + PROBE_ROUNDS * max(0.0, tokens_lost)
        worst_loss = point.worst_loss(option)
        catch_up = 0.0 if option is point.last_run else point.catch_up_rounds(option)
        budget = self._loss_budget
        if likely_loss > self._probe_credit or worst_loss > budget.allowed() or worst_loss + catch_up > budget.left():
            return None
        option.last_probe = self._now
        return _Probe(point, option.decisions[option.best], worst_loss)

    def _learn(self, point: PointState, drafted: tuple[DraftOption, int] | None, report: RoundReport) -> None:
        """Learns from a round of an option and the index of its length; None: of plain decoding."""
        if drafted is None:
            option, outcome = None, point.observe_plain(report.seconds, self._now)
        else:
            option, index = drafted
            outcome = point.observe_draft(option, index, report.rows, report.seconds, now=self._now)
        if outcome.jumped:  # the machine may have changed: probe plain decoding at once
            point.plain.factors[0].last = self._next_probe_check = self._now - PLAIN_TIME_MAX_AGE
        self._loss_budget.add(outcome.loss)
        if self._probe_credit < MAX_PROBE_CREDIT:
            self._probe_credit += PROBE_TOKEN_SHARE * outcome.tokens
        if report.decision.probe:
            lost = max(0.0, outcome.seconds * point.rate - outcome.tokens)
            self._probe_credit = max(-MAX_PROBE_CREDIT, self._probe_credit - lost)
        point.review(option, self._now)


class _Probe:
    """A few rounds in a row that are spent on learning; the first is decided when it is made."""

    __slots__ = ("decision", "point", "rounds_left", "worst_loss")

    def __init__(self, point: PointState, decision: RoundDecision, worst_loss: float) -> None:
        self.point = point
        self.decision = decision._replace(probe=True)
        self.worst_loss = worst_loss
        self.rounds_left = PROBE_ROUNDS - 1


def _is_possible(report: RoundReport, length: int) -> bool:
    """Whether one round of up to `length` proposed tokens can report such rows and seconds."""
    rows, seconds = report.rows, report.seconds
    if not isinstance(seconds, float | int) or not MIN_ROUND_S < seconds < MAX_ROUND_S:
        return False
    if (
        not isinstance(rows, tuple | list)
        or not rows
        or (report.decision.covered and len(rows) > report.decision.batch_size)
    ):
        return False
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 2:
            return False
        proposed, accepted = row
        if type(proposed) is not int or type(accepted) is not int or not 0 <= accepted <= proposed <= length:
            return False  # bool, and the integers of arrays, are not int
    return True
