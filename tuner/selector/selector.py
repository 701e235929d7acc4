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
from threading import Lock
from typing import Any, Literal, NamedTuple

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from profiles.records.core import PLAIN
from profiles.records.errors import InputError
from profiles.records.evidence import RoundCount
from tuner.policy.policy import Policy
from tuner.policy.query import MIXED, OperatingPoint
from tuner.selector.loss_budget import LossBudget
from tuner.selector.point import MIN_SHARE, PLAIN_ARM, Arm, Point
from tuner.selector.snapshot import load, save
from tuner.selector.state import SelectorState, Stream

GUARANTEE, WINDOW = 0.98, 5000
SNAPSHOT_VERSION = 3
MARGIN = 0.02  # another setup must promise so much more than the one in use
CERTAIN = 0.75  # weight of a request's main domain, under which rounds are also chosen for what they tell
REVIEW_ROUNDS = 2.0  # between two looks for a better setup
DWELL_ROUNDS = 4.0  # before the next change; new requests shorten it
PAYBACK_ROUNDS = 24  # in which a change must earn the time of catching up
PROBE_ROUNDS = 4
PROBE_CHECK_ROUNDS = 24  # between two looks for something to probe, on average
PLAIN_ROUNDS = 1024  # without a plain round, after which its time is probed
PROBE_ERRORS = 1.5  # standard errors that an option may be better than expected
PROBE_GAIN_SHARE, PROBE_ROUND_SHARE = 0.02, 0.001  # of what is gained over plain decoding, and of all rounds
INITIAL_PROBE_CREDIT, MAX_PROBE_CREDIT = 8.0, 32.0  # plain rounds
ANONYMOUS_SHARE = 0.8  # of rounds before in the domains of rows that are told without their requests
MAX_REQUESTS = 4096  # that are remembered
STATS_WEIGHT = 1.0 / 256.0  # of a round in the figures of `stats`
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


class _Rows(NamedTuple):
    """Stands for all rows of a domain that are told without their requests."""

    domain: str


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

    LEARNED = ("_now", "num_refused", "_random", "_next_probe", "_probe_credit", "_totals")

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
        self._requests: dict[Hashable, list[float]] = {}  # weights of domains, oldest request first
        self._now = 0
        self._probe_credit = INITIAL_PROBE_CREDIT
        self._random = seed % 2**64
        self._next_probe = PROBE_ROUNDS + seed % PROBE_CHECK_ROUNDS
        self._probe: tuple[Stream, Arm] | None = None
        self._probe_left = 0
        self._last_option: tuple[Point | None, int] = (None, 0)
        self._totals = [0.0] * 5  # tokens and seconds over plain's; proposed, expected and accepted tokens
        self.num_refused = 0
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
            plain, taken, proposed, expected, accepted = self._totals
            return SelectorStats(
                self._now,
                self.num_refused,
                expected / proposed if proposed else 0.0,
                accepted / proposed if proposed else 0.0,
                plain / taken if taken else 1.0,
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
            if requests:
                first = requests[0]
                same = len(requests) == 1
                domain = first.domain if same or all(each.domain == first.domain for each in requests) else None
                temperature = first.temperature if same else sum(each.temperature for each in requests) / len(requests)
                contexts = [each.context_length for each in requests if each.context_length is not None]
                context_length = max(contexts) if contexts else context_length
            batch_size = max(1, len(requests)) if batch_size is None else batch_size
            stream = self._state.find(batch_size, context_length, domain, temperature)
            if stream is None:
                return RoundDecision(PLAIN, False, 1, 1, MIXED, 0.0, False, tuple(requests))
            if stream.point is None:
                return RoundDecision(stream.fixed, True, *stream.key, False, tuple(requests))
            return self._decide(stream, stream.point, tuple(requests), per_request)

    def _decide(
        self, stream: Stream, point: Point, requests: tuple[RequestInfo, ...], per_request: bool
    ) -> RoundDecision:
        weights, num_new = self._weights(stream, requests)
        shares = [(share, domain) for domain, share in enumerate(weights) if share > MIN_SHARE]
        probing = self._probe is not None and self._probe[0] is stream and self._probe_left > 0
        if self._probe is not None and probing:
            arm = self._probe[1]
            self._probe_left -= 1
        else:
            self._probe = None
            stream.dwell -= 1.0 + DWELL_ROUNDS * num_new / max(1, len(requests))
            self._switch(stream, point, shares)
            arm = stream.arm
            if len(requests) == 1 and max(weights) < CERTAIN:
                arms = [arm, *({point.best[domain] for _, domain in shares} - {arm})]
                arm = point.informed(arms, weights, [self._catch_up_s(point, option) for option, _ in arms])
            if self._now >= self._next_probe:
                probe = self._plan_probe(stream, point, shares)
                if probe is not None:
                    arm, probing, self._probe, self._probe_left = probe, True, (stream, probe), PROBE_ROUNDS - 1
        arm = self._affordable(point, arm)
        catch_up = self._catch_up_s(point, arm[0]) > 0.0
        self._last_option = point, arm[0]
        lengths: tuple[int, ...] = ()
        if per_request and len(requests) > 1 and arm[0]:
            lengths = self._lengths(point, arm, requests, shares)
        setup = point.setups[arm[0]][arm[1]]
        return RoundDecision(setup, True, *stream.key, probing, requests, lengths, catch_up)

    def _weights(self, stream: Stream, requests: tuple[RequestInfo, ...]) -> tuple[list[float], int]:
        """Mean shares of domains in the batch, and how many requests are new."""
        domains = self._state.domains
        assert domains is not None
        if not requests:
            return self._requests.get(_Rows(stream.key.domain)) or domains.start(_label(stream.key.domain)), 0
        num_new, rows = 0, []
        for request in requests:
            weights = self._requests.get(request.id)
            if weights is None:
                num_new += 1
                weights = self._remember(request.id, list(domains.start(request.domain)))
            rows.append(weights)
        if len(rows) == 1:
            return rows[0], num_new
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)], num_new

    def _remember(self, request: Hashable, weights: list[float]) -> list[float]:
        if request not in self._requests and len(self._requests) >= MAX_REQUESTS:
            del self._requests[next(iter(self._requests))]
        self._requests[request] = weights
        return weights

    def _switch(self, stream: Stream, point: Point, shares: Sequence[tuple[float, int]]) -> None:
        """Takes the setup of the highest expected goodput into use, if it is a margin above the present one."""
        if stream.dwell > 0.0:
            return
        rate, plain_rate, best = point.value(stream.arm, shares), 1.0 / point.costs[0][0], stream.arm
        if rate <= plain_rate:
            best, rate = PLAIN_ARM, plain_rate
        best_rate = rate * (1.0 + MARGIN)
        candidates, (share, main) = {point.best[domain] for _, domain in shares}, max(shares)
        if share < CERTAIN:  # a setup may be the best of no domain, and good for all
            option = self._now % len(point.lengths)
            candidates.add((option, point.peak_index(option, main)))
        for arm in candidates:
            if arm != stream.arm and arm[0]:
                extra_s = self._catch_up_s(point, arm[0]) / PAYBACK_ROUNDS
                arm_rate = point.value(arm, shares, extra_s=extra_s) * point.discount(arm, stream.doubt)
                if arm_rate > best_rate:
                    best, best_rate = arm, arm_rate
        # what is in use is looked at again in a moment: estimates move little from round to round
        stream.dwell = REVIEW_ROUNDS if best == stream.arm else DWELL_ROUNDS
        stream.arm = best

    def _catch_up_s(self, point: Point, option: int) -> float:
        """Seconds in which a draft reads the text it missed; 0 for the one that ran last."""
        last_point, last_option = self._last_option
        if last_point is None or (last_point is point and last_option == option):
            return 0.0
        if option and last_option and last_point.drafts[last_option] == point.drafts[option]:
            return 0.0
        return point.catch_up_s[option]

    def _affordable(self, point: Point, arm: Arm) -> Arm:
        """The setup, shortened until a round of which nothing is accepted can be paid; else plain decoding."""
        option, index = arm
        if option:
            allowed_s = (1.0 + self._budget.allowed) * point.plain_s
            if self._catch_up_s(point, option) + point.costs[option][0] > 4.0 * allowed_s:
                return PLAIN_ARM
            for shorter in range(index, -1, -1):
                if point.costs[option][shorter] <= allowed_s:
                    return option, shorter
            return PLAIN_ARM
        return arm

    def _plan_probe(self, stream: Stream, point: Point, shares: Sequence[tuple[float, int]]) -> Arm | None:
        """Of the options that may be better than the setup in use, the one that may be best, if it can be paid."""
        self._random = (self._random * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX
        self._next_probe = self._now + PROBE_CHECK_ROUNDS // 2 + (self._random >> 33) % PROBE_CHECK_ROUNDS
        rate = point.value(stream.arm, shares)
        if stream.arm[0] and self._now - point.times.drafts[0].last >= PLAIN_ROUNDS:
            return PLAIN_ARM
        chosen, highest = None, rate * (1.0 + MARGIN)
        _, main = max(shares)
        for option in range(len(point.lengths)):
            if option == stream.arm[0]:
                continue
            arm = option, point.peak_index(option, main)
            value = point.value(arm, shares)
            hopeful = value * (1.0 + PROBE_ERRORS * point.error(arm, shares, self._now))
            if hopeful > highest:
                catch_up = self._catch_up_s(point, option) / point.plain_s
                cost = PROBE_ROUNDS * max(0.0, 1.0 - value / rate) + catch_up
                if cost <= self._probe_credit and (not option or self._affordable(point, arm) == arm):
                    chosen, highest = arm, hopeful
        return chosen

    def _lengths(
        self, point: Point, arm: Arm, requests: tuple[RequestInfo, ...], shares: Sequence[tuple[float, int]]
    ) -> tuple[int, ...]:
        """By request: the longest length whose last token is expected to earn its part of the round's time."""
        option, index = arm
        lengths, costs, models = point.lengths[option], point.costs[option], point.models[option]
        worth = point.value(arm, shares)  # tokens per second of a row: what a second is worth
        chosen = []
        for request in requests:
            weights = self._requests[request.id]
            best = 0
            for shorter in range(1, index + 1):
                more = sum(
                    w * (m.tokens[shorter] - m.tokens[shorter - 1]) for w, m in zip(weights, models, strict=True)
                )
                if more < worth * (costs[shorter] - costs[shorter - 1]):
                    break
                best = shorter
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
            key = OperatingPoint(*decision[2:6])
            stream = self._state.streams.get(key) if decision.covered else None
            arm = None if stream is None or stream.point is None else stream.point.find(decision.setup)
            lost = decision.covered and (stream is None or (stream.point is not None and arm is None))
            if lost or not _is_possible(report, decision.setup.length, many):
                self.num_refused += not (lost and key in self._replaced)  # it was under way when the policy changed
                return False
            if stream is not None and stream.point is not None and arm is not None:
                self._learn(stream, stream.point, arm, report, many)
            return True

    def _learn(self, stream: Stream, point: Point, arm: Arm, report: RoundReport, many: bool) -> None:
        option = arm[0]
        rows, decision = report.rows, report.decision
        num_rounds = len(rows) if many else 1
        scale = 1.0 / max(1, len(decision.requests)) if many else 1.0  # of a request's rounds
        self._now += max(1, round(scale * num_rounds))
        proposed = [row[0] for row in rows]
        accepted = sum([row[1] for row in rows])
        widths = proposed if many else [max(proposed)]
        length = max(decision.lengths, default=decision.setup.length)
        # a model drafts what was decided, also where an engine drops its tokens or a request ends before
        is_whole = point.is_lookup[option] or min(widths) == length
        taken_s = sum([point.round_s(arm, width) for width in widths])  # the machine's noise is not the draft's
        if not is_whole:
            longest_s = len(widths) * point.round_s(arm, length) + decision.catch_up * 4.0 * point.catch_up_s[option]
            taken_here_s = longest_s if report.seconds is None else report.seconds / math.exp(point.times.machine)
            taken_s = min(longest_s, max(taken_s, taken_here_s))
        elif report.seconds is not None:
            stored_s = sum([point.times.seconds[option][width] for width in widths])
            if not decision.catch_up:
                point.times.observe(
                    arm, report.seconds / stored_s, self._now, idle=bool(option) and not max(proposed), count=num_rounds
                )
            else:
                caught_up_s = report.seconds / math.exp(point.times.machine) - taken_s
                taken_s += min(max(0.0, caught_up_s), 4.0 * point.catch_up_s[option])
        taken_s += report.extra_s / math.exp(point.times.machine)
        heaviest = 0
        if option:
            heaviest = self._learn_acceptance(stream, point, arm, report)
        tokens = (accepted + len(rows)) / len(rows) * num_rounds
        taken = scale * taken_s / point.plain_s
        tokens *= scale
        self._budget.add(taken - tokens, scale * num_rounds)
        self._totals[0] += tokens
        self._totals[1] += taken
        if taken < tokens:
            self._probe_credit += PROBE_GAIN_SHARE * (tokens - taken)
        if decision.probe:
            shares = [(share, domain) for domain, share in enumerate(self._weights(stream, decision.requests)[0])]
            self._probe_credit -= max(0.0, taken * point.plain_s * point.value(stream.arm, shares) - tokens)
        credit = self._probe_credit + PROBE_ROUND_SHARE * scale * num_rounds
        self._probe_credit = min(MAX_PROBE_CREDIT, max(-MAX_PROBE_CREDIT, credit))
        point.refresh_after(option, heaviest)

    def _learn_acceptance(self, stream: Stream, point: Point, arm: Arm, report: RoundReport) -> int:
        """Updates requests and acceptance; returns a domain of which the round told most."""
        domains, (option, index) = self._state.domains, arm
        assert domains is not None
        draft, decision = point.drafts[option], report.decision
        infos = {request.id: request for request in decision.requests}
        ids = report.ids if report.ids is not None else tuple(infos) or (_Rows(stream.key.domain),) * len(report.rows)
        heaviest, num_rows = 0, len(report.rows)
        after: dict[Hashable, list[list[float]]] = {}
        for request, row in zip(ids, report.rows, strict=True):
            info = infos.get(request)
            label = info.domain if info is not None else _label(stream.key.domain)
            weights = self._requests.get(request) or domains.start(label)
            models = point.models[option]
            if info is not None and info.temperature != point.temperature:
                nearest = min(domains.temperatures, key=lambda value: abs(value - info.temperature))
                models = domains.models[nearest][draft]
            main = models[weights.index(max(weights))]
            expected = main.tokens[index] - 1.0
            new_weights, heaviest = domains.learn(weights, label, models, row)
            if info is None:
                after.setdefault(request, []).append(new_weights)
            else:
                self._remember(request, new_weights)
            totals, rate = self._totals, STATS_WEIGHT / num_rows
            totals[2] += rate * (row[0] - totals[2])
            totals[3] += rate * (expected - totals[3])
            totals[4] += rate * (row[1] - totals[4])
        for request, rows in after.items():  # rows of many requests: what one of them is like says little of the next
            start, share = domains.start(_label(stream.key.domain)), ANONYMOUS_SHARE / len(rows)
            means = [share * sum(column) for column in zip(*rows, strict=True)]
            self._remember(
                request, [mean + (1.0 - ANONYMOUS_SHARE) * first for mean, first in zip(means, start, strict=True)]
            )
        return heaviest

    def finish(self, requests: Iterable[Hashable]) -> None:
        """Forgets requests that ended."""
        with self._lock:
            for request in requests:
                self._requests.pop(request, None)

    def replace(self, policy: Policy) -> None:
        """Switches to another policy and keeps what was learned of drafts and domains that both have.

        The new state is prepared beside the one in use, so nobody waits for it. Raises as the constructor.
        """
        state = SelectorState(policy, **self._options)
        with self._lock:
            state.take_over(self._state)
            self._replaced = frozenset(self._state.streams)
            self._state, self._probe, self._last_option = state, None, (None, 0)
            self._requests.clear()

    def snapshot(self) -> dict[str, Any]:
        """All that was learned, as JSON values for `restore`, in another process too; requests are left out."""
        with self._lock:
            state, domains = self._state, self._state.domains
            state.update()  # as `restore` does
            rows = [[key.domain, list(weights)] for key, weights in self._requests.items() if isinstance(key, _Rows)]
            mixes = [] if domains is None else [[label, list(mix)] for label, (mix, _) in domains.mixes.items()]
            return {
                "version": SNAPSHOT_VERSION,
                "policy": state.digest,
                "selector": save([self, self._budget]),
                "state": save(state.parts()),
                "minima": [list(minimum) for minimum in self._budget.minima],
                "mixes": mixes,
                "rows": rows,
            }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot.

        Raises:
            InputError: it is of another policy or version, or damaged; nothing is changed.
        """
        version = snapshot.get("version")
        if version != SNAPSHOT_VERSION:
            raise InputError(f"snapshot version {version!r}: this draftpick reads version {SNAPSHOT_VERSION}")
        fresh = Selector(self.policy, guarantee=self._guarantee, window=self._window, **self._options)
        state, budget = fresh._state, fresh._budget
        if snapshot.get("policy") != state.digest:
            raise InputError("the snapshot was made under another policy: restore it before `replace`")
        try:
            load([fresh, budget], snapshot["selector"])
            load(state.parts(), snapshot["state"])
            budget.minima.clear()
            budget.minima.extend((float(now), float(total)) for now, total in snapshot["minima"])
            if not 0.0 <= budget.loss < math.inf:
                raise ValueError("an impossible loss")
            for label, mix in snapshot["mixes"] if state.domains is not None else ():
                assert state.domains is not None
                state.domains.start(label)[:] = [float(share) for share in mix]
            rows: dict[Hashable, list[float]] = {
                _Rows(domain): [float(weight) for weight in weights] for domain, weights in snapshot["rows"]
            }
            state.update()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"the snapshot is damaged: {type(error).__name__} {error}") from error
        with self._lock:
            self._state, self._budget, self._probe, self._last_option = state, budget, None, (None, 0)
            load([self], snapshot["selector"][:1])
            self._requests = rows


def _label(domain: str) -> str | None:
    return None if domain == MIXED else domain


def _is_possible(report: RoundReport, length: int, many: bool) -> bool:
    """Whether rounds of up to `length` proposed tokens can report such rows and seconds."""
    rows, seconds, decision = report.rows, report.seconds, report.decision
    ids = [request.id for request in decision.requests] if report.ids is None and not many else report.ids
    for value in (MAX_ROUND_S / 2 if seconds is None else seconds, report.extra_s + 2 * MIN_ROUND_S):
        if not isinstance(value, float | int) or not MIN_ROUND_S < value < MAX_ROUND_S:
            return False
    if not isinstance(rows, tuple | list) or not rows:
        return False
    if many:
        fits = ids != ()
    else:
        fits = not ids or len(rows) == len(ids) == len(set(ids))
        fits &= not decision.covered or len(rows) <= decision.batch_size
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 2:
            return False
        proposed, accepted = row
        if type(proposed) is not int or type(accepted) is not int or not 0 <= accepted <= proposed <= length:
            return False  # bool, and the integers of arrays, are not int
    return fits
