"""Chooses the setup of every round at run time, learns from what rounds report, and returns to plain decoding.

It starts from a policy and the measurements behind it, and does no I/O and reads no clock, so any server can hold one.
Serving code:

    from tuner.selector import RequestInfo, RoundReport, Selector, read_policy

    selector = Selector(read_policy("policy.json"))
    for request in requests:
        while not request.done:
            info = RequestInfo(request.id, request.domain, request.context_length)
            decision = selector.choose(requests=[info])
            started = time.perf_counter()
            proposed, accepted = decode_round(request, decision.setup)
            seconds = time.perf_counter() - started
            selector.observe(RoundReport(decision, ((proposed, accepted),), seconds))
        selector.finish([request.id])

Decisions and reports pair with any delay and in any order.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from operator import mul
from threading import Lock
from typing import Any, Literal, NamedTuple

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from profiles.records.core import PLAIN
from profiles.records.errors import InputError
from profiles.records.evidence import RoundCount
from tuner.policy.policy import Policy
from tuner.policy.query import MIXED, OperatingPoint
from tuner.selector.acceptance import Text
from tuner.selector.loss_budget import LossBudget
from tuner.selector.point import MIN_SHARE, PLAIN_ARM, Arm, Point
from tuner.selector.state import SelectorState, Stream, load, save

GUARANTEE, WINDOW = 0.98, 5000
SNAPSHOT_VERSION = 5
MARGIN = 0.02  # another setup must promise so much more than the one in use
CERTAIN = 0.9  # share of a request's main domain, under which rounds are also chosen for what they tell
OPEN_SHARE = 0.05  # of other domains, up to which the best setup of the main one is the best
REVIEW_ROUNDS = 2.0  # between two looks for a better setup
DWELL_ROUNDS = 4.0  # before the next change; new requests shorten it
PAYBACK_ROUNDS = 24  # in which a change must earn the time of catching up
PROBE_ROUNDS = 4
PROBE_CHECK_ROUNDS = 67  # between two looks at a draft that may be worth a probe
PLAIN_ROUNDS = 1024  # without a plain round, after which its time is probed
PROBE_ERRORS = 1.5  # standard errors that an option may be better than expected
MAX_CATCH_UP = 4.0  # times what catching up is expected to take, that a round is charged
MAX_REQUESTS = 4096  # that are remembered
STATS_WEIGHT = 1.0 / 256.0  # of a round in the figures of `stats`
SEQUENCES, NUMBERS = (tuple, list), (float, int)
MIN_ROUND_S, MAX_ROUND_S = 1e-9, 1e6


class SelectorStats(NamedTuple):
    """Figures for gauges.

    `expected_acceptance`, `seen_acceptance`: accepted over proposed tokens of the latest drafting rounds, as expected
    when they were decided and as reported. `gain`: tokens per second over plain decoding's since the start.
    `budget`: share of the guarantee's budget that is left.
    """

    num_rounds: int
    num_refused: int
    expected_acceptance: float
    seen_acceptance: float
    gain: float
    budget: float


class Selector:
    """Decides the setup of every round by one policy and what was learned since. Threads may share it.

    The same reports in the same order give the same decisions. `num_refused` counts impossible reports.

    Args:
        drafts: names of the drafts that the engine has loaded; None: it can run all of the policy's.
        guarantee: least throughput over plain decoding, of any `window` consecutive rounds; None: no bound. It costs
            what docs/selector.md says.
        baseline: whose time plain decoding is. `k0`: a round of no drafted token in this very loop. `server`: a server
            without speculation, as it was measured.
        max_length: the longest length that the engine was started with; None: as measured.
        seed: shifts the moments of probes.

    Raises:
        InputError: the policy holds a number that is not finite, or the guarantee or the window is impossible.
    """

    key = "selector"
    LEARNED = ("_now", "num_refused", "_next_probe", "_num_looks", "_totals")

    def __init__(
        self,
        policy: Policy,
        *,
        drafts: Collection[str] | None = None,
        guarantee: float | None = GUARANTEE,
        window: int = WINDOW,
        baseline: Literal["k0", "server"] = "k0",
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self._options: dict[str, Any] = {"drafts": drafts, "max_length": max_length, "baseline": baseline}
        self._guarantee, self._window = guarantee, window
        self._state = SelectorState(policy, **self._options)
        self._lock = Lock()
        self._budget = LossBudget(guarantee, window)
        self._texts: dict[Hashable, Text] = {}  # of requests, the oldest first
        self._now = 0
        self._next_probe = PROBE_ROUNDS + seed % PROBE_CHECK_ROUNDS
        self._num_looks = 0  # for an option in turn
        self._totals = [0.0] * 5  # plain seconds and those taken; of late proposed, expected and accepted tokens
        self.num_refused = 0
        self._last_draft: int | None = None  # number in the prior of the draft that was decided last; -1: none
        self._replaced: frozenset[OperatingPoint] = frozenset()  # points of the policy before

    @property
    def policy(self) -> Policy:
        return self._state.policy

    @property
    def num_rounds(self) -> int:
        """Rounds that were learned from."""
        return self._now

    def stats(self) -> SelectorStats:
        with self._lock:
            plain_s, taken_s, proposed, expected, accepted = self._totals
            return SelectorStats(
                self._now,
                self.num_refused,
                expected / proposed if proposed else 0.0,
                accepted / proposed if proposed else 0.0,
                plain_s / taken_s if taken_s else 1.0,
                self._budget.left,
            )

    def choose(
        self,
        *,
        batch_size: int | None = None,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
        requests: Sequence[RequestInfo] = (),
        per_request: bool = False,
    ) -> RoundDecision:
        """The setup of the next round, at the measured operating point that `Policy.look_up` finds.

        A temperature, or a context beyond the longest, takes the nearest measured one.

        Args:
            batch_size: rows of the batch; None: as many as requests, or 1.
            context_length: tokens of prompt and output; None: not known.
            requests: the requests of the batch. Without them rows are told by `domain` alone.
            per_request: `lengths` may differ by request.

        Raises:
            InputError: an impossible value.
        """
        with self._lock:
            if len(requests) == 1:
                _, domain, context, temperature = requests[0]
                context_length = context_length if context is None else context
            elif requests:
                domain = requests[0].domain
                if any(request.domain != domain for request in requests):
                    domain = None
                temperature = sum([request.temperature for request in requests]) / len(requests)
                contexts = [request.context_length for request in requests if request.context_length is not None]
                context_length = max(contexts) if contexts else context_length
            if batch_size is None:
                batch_size = max(1, len(requests))
            stream = self._state.find(batch_size, context_length, domain, temperature)
            if stream is None:
                return RoundDecision(PLAIN, False, 1, 1, MIXED, 0.0, False, tuple(requests))
            if stream.point is None:
                return RoundDecision(stream.setup, True, *stream.operating_point, False, tuple(requests))
            return self._decide(stream, stream.point, tuple(requests), per_request)

    def _decide(
        self, stream: Stream, point: Point, requests: tuple[RequestInfo, ...], per_request: bool
    ) -> RoundDecision:
        weights = self._weights(stream, requests)
        share = max(weights)
        if not stream.probe_left:
            if stream.dwell <= 0.0:
                self._switch(stream, point, weights, share)
            if self._now >= self._next_probe:
                self._next_probe = self._now + PROBE_CHECK_ROUNDS
                self._plan_probe(stream, point, weights)
        arm, probes = stream.arm, stream.probe_left > 0
        if probes:
            stream.probe_left -= 1
            arm = stream.probe
        elif share < CERTAIN and len(requests) == 1:
            arms = {arm, *_best_arms(point, weights)}
            if len(arms) > 1:
                worth = point.informed(self._worth(point, sorted(arms), weights), weights)
                arm = max(worth, key=worth.__getitem__)
        catch_up_s = self._catch_up_s(point, arm[0])
        if arm[0]:
            arm = self._affordable(point, arm, catch_up_s)
        self._last_draft = point.drafts[arm[0]]
        lengths: tuple[int, ...] = ()
        if per_request and len(requests) > 1 and arm[0]:
            lengths = self._lengths(point, arm, requests, weights)
        setup = point.setups[arm[0]][arm[1]]
        catch_up = catch_up_s > 0.0 and arm[0] > 0
        return RoundDecision(setup, True, *stream.operating_point, probes, requests, lengths, catch_up)

    def _weights(self, stream: Stream, requests: tuple[RequestInfo, ...]) -> list[float]:
        """Mean shares of domains in the batch; new requests bring the next look for a better setup forward."""
        domains, texts = self._state.domains, self._texts
        assert domains is not None
        stream.dwell -= 1.0
        if not requests:
            return domains.rows[stream.label][0]
        rows = []
        for request in requests:
            text = texts.get(request.id)
            if text is None:
                stream.dwell -= DWELL_ROUNDS / len(requests)
                if len(texts) >= MAX_REQUESTS:
                    del texts[next(iter(texts))]
                text = texts[request.id] = domains.start(request.domain)
            rows.append(text[0])
        return rows[0] if len(rows) == 1 else [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def _switch(self, stream: Stream, point: Point, weights: Sequence[float], share: float) -> None:
        """Takes the setup of the highest expected goodput into use, if it is a margin above the present one."""
        stream.dwell = REVIEW_ROUNDS  # estimates move little from round to round
        main = weights.index(share)
        if share > 1.0 - OPEN_SHARE and point.best[main] == stream.arm:
            return
        candidates = _best_arms(point, weights)
        if share < CERTAIN:  # a setup may be the best of no domain, and good for all
            candidates.add(point.peak(self._now % len(point.lengths), main))
        present = {stream.arm, PLAIN_ARM}
        worth = self._worth(point, [stream.arm, PLAIN_ARM, *sorted(candidates - present)], weights)
        for arm in present:
            worth[arm] *= 1.0 + MARGIN
        best = max(worth, key=worth.__getitem__)
        if best != stream.arm:
            stream.arm, stream.dwell = best, DWELL_ROUNDS

    def _worth(self, point: Point, arms: Iterable[Arm], weights: Sequence[float]) -> dict[Arm, float]:
        """Tokens per second of setups, catching up included."""
        return {arm: point.value(arm, weights, self._catch_up_s(point, arm[0]) / PAYBACK_ROUNDS) for arm in arms}

    def _catch_up_s(self, point: Point, option: int) -> float:
        """Seconds in which a draft reads the text it missed; 0 for the one that ran last."""
        last = self._last_draft
        return 0.0 if last is None or not option or last == point.drafts[option] else point.catch_up_s[option]

    def _affordable(self, point: Point, arm: Arm, extra_s: float) -> Arm:
        """The setup, shortened until a round of which nothing is accepted can be paid; else plain decoding."""
        option, index = arm
        allowed_s = point.plain_s + self._budget.allowed_s(point.plain_s) - extra_s
        costs = point.costs[option]
        while index >= 0 and costs[index] > allowed_s:
            index -= 1
        return (option, index) if index >= 0 else PLAIN_ARM

    def _plan_probe(self, stream: Stream, point: Point, weights: Sequence[float]) -> None:
        """Probes plain decoding after a time, or the next option in turn where it may be better and can be paid."""
        arm, main = PLAIN_ARM, weights.index(max(weights))
        if not stream.arm[0] or self._now - point.times.last[0] < PLAIN_ROUNDS:
            self._num_looks += 1
            arm = point.peak(self._num_looks % len(point.lengths), main)
            if arm[0] in (0, stream.arm[0]):
                return
            hopeful = point.value(arm, weights) * (1.0 + PROBE_ERRORS * point.error(arm, main, self._now))
            if hopeful <= point.value(stream.arm, weights) * (1.0 + MARGIN):
                return
            if self._affordable(point, arm, self._catch_up_s(point, arm[0])) != arm:
                return
        stream.probe, stream.probe_left = arm, PROBE_ROUNDS

    def _lengths(
        self, point: Point, arm: Arm, requests: tuple[RequestInfo, ...], weights: list[float]
    ) -> tuple[int, ...]:
        """By request: the longest length whose last token is expected to earn its part of the round's time."""
        option, index = arm
        lengths, costs = point.lengths[option], point.costs[option]
        worth = point.value(arm, weights)  # tokens per second of a row: what a second is worth
        chosen = []
        for request in requests:
            shares, _ = self._texts.get(request.id) or (weights, 0)
            columns = zip(*(model.tokens for model in point.models[option].models), strict=True)
            tokens = [sum(map(mul, shares, column)) for column in columns]
            best = 0
            while best < index and tokens[best + 1] - tokens[best] >= worth * (costs[best + 1] - costs[best]):
                best += 1
            chosen.append(lengths[best])
        return tuple(chosen)

    def observe(self, report: RoundReport) -> bool:
        """Learns from a round that was run as decided. Returns False for an impossible report: it is only counted."""
        return self._observe(report)

    def observe_many(
        self,
        decision: RoundDecision,
        rounds: Sequence[RoundCount],
        seconds: float,
        *,
        request: Hashable | None = None,
    ) -> bool:
        """Learns from all rounds of one request that were run as decided; `seconds` in all.

        Rounds of a batch count once: each request's by its share of the batch. Returns False for an impossible report.

        Args:
            request: id of the request; None: the decision's only one, or none where it was made without.
        """
        ids = [each.id for each in decision.requests]
        if request is None and len(ids) == 1:
            request = ids[0]
        named = (request,) * len(rounds) if request in ids else () if ids or request is not None else None
        return self._observe(RoundReport(decision, tuple(rounds), seconds, ids=named), many=True)

    def _observe(self, report: RoundReport, *, many: bool = False) -> bool:
        decision = report.decision
        with self._lock:
            stream = arm = point = None
            is_lost = False
            if decision.covered:
                stream = self._state.streams.get(decision[2:6])  # type: ignore[call-overload]
                point = None if stream is None else stream.point
                arm = None if point is None else point.find(decision.setup)
                is_lost = stream is None or (point is not None and arm is None)
            if is_lost or not _is_possible(report, many):
                # a round may have been under way when the policy was replaced
                self.num_refused += not (is_lost and decision[2:6] in self._replaced)
                return False
            if stream is not None and point is not None and arm is not None:
                self._learn(stream, point, arm, report, many=many)
            return True

    def _learn(self, stream: Stream, point: Point, arm: Arm, report: RoundReport, *, many: bool) -> None:
        """Learns from a round, or from many of one request, which count by its share of the batch."""
        decision, num_rows = report.decision, len(report.rows)
        num_rounds, scale = (num_rows, 1.0 / max(1, len(decision.requests))) if many else (1, 1.0)
        count = scale * num_rounds
        self._now += max(1, round(count))
        taken_s = scale * self._learn_times(point, arm, report, num_rounds)
        num_accepted, mains = self._learn_acceptance(stream, point, arm, report) if arm[0] else (0, [0])
        plain_s = point.plain_s
        emitted_s = count * (num_accepted / num_rows + 1.0) * plain_s
        lost_s = taken_s - emitted_s
        self._budget.add(lost_s, plain_s, count)
        self._totals[0] += emitted_s
        self._totals[1] += taken_s
        point.refresh_after(arm[0], mains)

    def _learn_times(self, point: Point, arm: Arm, report: RoundReport, num_rounds: int) -> float:
        """Learns from the seconds of rounds; returns those expected of such: noise of the machine is no loss."""
        decision, option = report.decision, arm[0]
        length = max(decision.lengths) if decision.lengths else decision.setup.length
        widths = [proposed for proposed, _ in report.rows]
        widest, narrowest = max(widths), min(widths)
        if num_rounds == 1:
            narrowest, taken_s, stored_s = widest, point.round_s(arm, widest), point.seconds[option][widest]
        else:
            taken_s = sum([point.round_s(arm, width) for width in widths])
            stored_s = sum([point.seconds[option][width] for width in widths])
        if not decision.catch_up and (narrowest == length or point.is_lookup[option]):
            if report.seconds is not None:
                point.times.observe(arm if widest else PLAIN_ARM, report.seconds / stored_s, self._now, num_rounds)
        else:  # a model drafts what was decided, also where an engine drops its tokens or a request ends before
            most_s = num_rounds * point.round_s(arm, length)
            most_s += decision.catch_up * MAX_CATCH_UP * point.catch_up_s[option]
            seconds = most_s if report.seconds is None else report.seconds / math.exp(point.times.machine)
            taken_s = max(taken_s, min(most_s, seconds))
        return taken_s + report.extra_s / math.exp(point.times.machine) if report.extra_s else taken_s

    def _learn_acceptance(self, stream: Stream, point: Point, arm: Arm, report: RoundReport) -> tuple[int, list[int]]:
        """Learns from rows of drafted rounds; returns accepted tokens, and by row the domain that it is most like."""
        domains, decision, (option, index) = self._state.domains, report.decision, arm
        assert domains is not None
        infos: Sequence[RequestInfo | None] = decision.requests or (None,) * len(report.rows)
        if report.ids is not None:
            by_id = {info.id: info for info in decision.requests}
            infos = [by_id.get(name) for name in report.ids]
        lengths = dict(zip(decision.requests, decision.lengths, strict=True)) if decision.lengths else {}
        mains, num_proposed, num_accepted, expected = [], 0, 0, 0.0
        for info, (proposed, accepted) in zip(infos, report.rows, strict=True):
            draft, text, length = point.models[option], domains.rows[stream.label], decision.setup.length
            if info is not None:
                if info.temperature != point.temperature:
                    draft = domains.nearest(info.temperature)[point.drafts[option]]
                text = self._texts.get(info.id) or domains.start(info.domain)
                length = lengths[info] if lengths else length
            # tokens that could not be proposed, as the text or the match ends, are not gained
            main = domains.learn(text, draft, (length, accepted) if proposed else (0, 0))
            mains.append(main)
            num_proposed += proposed
            num_accepted += accepted
            expected += draft.models[main].tokens[index] - 1.0
        for number, count in enumerate((num_proposed, expected, num_accepted), 2):
            self._totals[number] += STATS_WEIGHT * (count / len(mains) - self._totals[number])
        return num_accepted, mains

    def finish(self, requests: Iterable[Hashable]) -> None:
        """Forgets requests that ended."""
        with self._lock:
            for request in requests:
                text = self._texts.pop(request, None)
                if text is not None and self._state.domains is not None:
                    self._state.domains.finish(text)

    def replace(self, policy: Policy) -> None:
        """Switches to another policy and keeps what was learned of drafts and domains that both have.

        The new state is prepared beside the one in use, so nobody waits for it. Raises as the constructor.
        """
        state = SelectorState(policy, **self._options)
        with self._lock:
            load(state.parts(), save(self._state.parts()), strict=False)
            if state.domains is not None:
                state.domains.align()
            state.update()
            self._replaced = frozenset(self._state.streams)
            self._state = state
            self._forget()

    def snapshot(self) -> dict[str, Any]:
        """All that was learned, as JSON values for `restore`, in another process too; requests are left out."""
        with self._lock:
            self._state.update()  # as `restore` does
            learned = save([self, self._budget, *self._state.parts()])
            return {"version": SNAPSHOT_VERSION, "policy": self._state.digest, "learned": learned}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot.

        Raises:
            InputError: it is of another policy or version, or damaged; nothing is changed.
        """
        version = snapshot.get("version")
        if version != SNAPSHOT_VERSION:
            raise InputError(f"snapshot version {version!r}: this draftpick reads version {SNAPSHOT_VERSION}")
        fresh = Selector(self.policy, guarantee=self._guarantee, window=self._window, **self._options)
        if snapshot.get("policy") != fresh._state.digest:
            raise InputError("the snapshot was made under another policy: restore it before `replace`")
        try:
            load([fresh, fresh._budget, *fresh._state.parts()], snapshot["learned"])
            fresh._state.update()
            fresh._state.check()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"the snapshot is damaged: {type(error).__name__} {error}") from error
        with self._lock:
            self._state, self._budget = fresh._state, fresh._budget
            load([self], snapshot["learned"])
            self._forget()

    def _forget(self) -> None:
        """What belongs to rounds under way."""
        self._last_draft = None
        self._texts.clear()


def _best_arms(point: Point, weights: Sequence[float]) -> set[Arm]:
    """The best setups of the domains that say something."""
    return {best for best, share in zip(point.best, weights, strict=True) if share > MIN_SHARE}


def _is_possible(report: RoundReport, many: bool) -> bool:
    """Whether a round, or many of one request, can report such rows and seconds."""
    decision, rows, seconds, extra_s, ids = report
    if not isinstance(rows, SEQUENCES) or not rows:
        return False
    if many:
        fits = ids != ()
    else:
        if ids is None and decision.requests:
            ids = tuple([request.id for request in decision.requests])
        fits = ids is None or len(rows) == len(ids) == len(set(ids))
        fits &= not decision.covered or len(rows) <= decision.batch_size
    length = decision.setup.length
    for row in rows:
        if not isinstance(row, SEQUENCES) or len(row) != 2:
            return False
        proposed, accepted = row
        if type(proposed) is not int or type(accepted) is not int or not 0 <= accepted <= proposed <= length:
            return False  # bool, and the integers of arrays, are not int
    return fits and (seconds is None or _is_time(seconds, MIN_ROUND_S)) and _is_time(extra_s, 0.0)


def _is_time(value: Any, least: float) -> bool:
    return isinstance(value, NUMBERS) and least <= value < MAX_ROUND_S
