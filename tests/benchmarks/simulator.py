"""A simulated server: streams of requests served on traces and step times, beside plain decoding's time."""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from profiles.acceptance.expected_rounds import (
    DraftAcceptance,
    catch_up_width,
    check_length,
    round_outcomes,
)
from profiles.engines.base import RequestInfo, RoundController, RoundReport
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.evidence import RoundCount, StepShape
from tests.benchmarks.traffic import Disturbance, Moment, Request, Stream
from tuner.forecast.evidence import Evidence
from tuner.forecast.forecaster import Forecaster


class RoundResult(NamedTuple):
    """A round that was run.

    `seconds`: the round and the prefills its rows waited for. `plain_s`: what plain decoding would have taken for as
    many tokens of that batch, on the machine as it was in that round, which is `slowed` times slower than usual by
    noise and disturbance. `phase`: of the stream.
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

    rounds: tuple[RoundResult, ...]

    @property
    def tokens(self) -> int:
        """Without the first of every output, which comes from its prefill."""
        return sum(result.tokens for result in self.rounds)

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.rounds)

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def usual_rate(self) -> float:
        """Tokens per second of the machine as it usually is: noise and disturbance are the same for all controllers."""
        return self.tokens / sum(result.seconds / result.slowed for result in self.rounds)

    @property
    def over_plain(self) -> float:
        """Seconds plain decoding would have taken in these very conditions, over those it took."""
        return sum(result.plain_s for result in self.rounds) / self.seconds

    def worst_window(self, size: int) -> float:
        """The least `over_plain` of `size` rounds in a row, in seconds of the machine as it usually is.

        A spike would give the few rounds that it happens to hit the weight of many, though in the long run it hits
        plain decoding as often. All rounds are one window when there are no more.
        """
        plain_s, seconds = self._sums()
        size = min(size, len(self.rounds))
        starts = range(len(self.rounds) - size + 1)
        return min((plain_s[at + size] - plain_s[at]) / (seconds[at + size] - seconds[at]) for at in starts)

    def worst_prefix(self, size: int) -> float:
        """The least `over_plain` of the first `size` or more rounds, in seconds of the machine as it usually is."""
        return min(
            plain_s / seconds
            for plain_s, seconds in list(zip(*self._sums(), strict=True))[min(size, len(self.rounds)) :]
        )

    def _sums(self) -> tuple[list[float], list[float]]:
        """Plain decoding's seconds and those taken, before every round and in all."""
        plain_s = accumulate((result.plain_s / result.slowed for result in self.rounds), initial=0.0)
        seconds = accumulate((result.seconds / result.slowed for result in self.rounds), initial=0.0)
        return list(plain_s), list(seconds)


PLAIN_SHAPE = StepShape(1)
Outcome = tuple[int, int, bool]  # proposed, accepted, and whether the draft model ran
Ways = tuple[list[Outcome], list[float]]  # in which a round can go, and their cumulative probabilities
PLAIN_ROUND: Outcome = (0, 0, False)


class Simulator:
    """Serves streams. What it works out about traces and times is kept, so a second stream is served faster.

    Args:
        workload: names the sampling and the most tokens of an output; its batch size says nothing.
        evidence: what drafts do on prompts.
        forecasters: what rounds take, by batch size; a batch is timed like the smallest that is at least as large.
    """

    def __init__(self, workload: Workload, evidence: Evidence, forecasters: Mapping[int, Forecaster]) -> None:
        self.workload, self.evidence, self.forecasters = workload, evidence, forecasters
        self._arms: dict[Setup, _Arm] = {}
        sizes = sorted(forecasters)
        self.sizes = [0, *(min(size for size in sizes if size >= rows) for rows in range(1, sizes[-1] + 1))]

    def serve(
        self,
        stream: Stream,
        controller: RoundController,
        *,
        seed: int = 0,
        noise: Sequence[float] = (1.0,),
        disturbance: Disturbance | None = None,
        labelled: bool = True,
        num_rounds: int | None = None,
        delay: int = 0,
    ) -> Record:
        """Every request of the stream, in its order, as many rows at a time as it says.

        The controller decides for the rows in use, as in a server whose batch is as large as its requests; the torch
        engine steps all rows of its batch and decides for those.

        `noise`: factors of which one is drawn for every round's time, plain decoding's included. `labelled`: whether
        the controller is told the domains of requests. `num_rounds`: the stream starts over until so many were run.
        `delay`: reports are so many rounds late, and then without what rows waited for a draft's prefill.
        Drafts that are sampled are drawn by `seed`; greedy ones have none. Raises: InputError: the stream needs a
        larger batch than was measured. NotMeasuredError: a prompt, or a setup that was picked, is not in the evidence.
        """
        if stream.most_rows >= len(self.sizes):
            raise InputError(f"stream {stream.name!r} needs batch {stream.most_rows}: {max(self.sizes)} is measured")
        return _Run(self, stream, seed, noise, labelled).play(controller, disturbance, num_rounds, delay)

    def arm(self, setup: Setup) -> "_Arm":
        """Outcomes and times of rounds of this setup."""
        arm = self._arms.get(setup)
        if arm is None:
            arm = self._arms[setup] = _Arm(self, setup)
        return arm


class _Row:
    """A request under way.

    `start` is the next output position; `num_cached` by draft model: tokens of its text in the model's cache.
    """

    __slots__ = ("domain", "info", "key", "num_cached", "phase", "prompt", "prompt_tokens", "size", "start")

    def __init__(self, request: Request, size: int, most: int, info: RequestInfo) -> None:
        self.domain, self.phase, self.info, self.prompt = info.domain, request.phase, info, request.prompt
        self.key = request.prompt.digest, size, most
        self.prompt_tokens = len(request.prompt.token_ids)
        self.size = size
        self.start = 1
        self.num_cached: dict[str, int] = {}

    @property
    def length(self) -> int:
        """Tokens of its text so far."""
        return self.prompt_tokens + self.start

    def behind(self, model: str) -> int:
        return self.length - self.num_cached.get(model, 0)


class _Arm:
    """Outcomes and times of rounds of one setup, each worked out once."""

    def __init__(self, simulator: Simulator, setup: Setup) -> None:
        self.setup = setup
        models = [part.digest for part in setup.draft.components if part.kind != "ngram"] if setup.draft else []
        self.model = models[0] if models else None
        self._simulator = simulator
        self._ways: dict[tuple[str, int, int], list[Ways | None]] = {}
        self._acceptances: dict[str, DraftAcceptance] = {}
        self._seconds: dict[tuple[int, StepShape], float] = {}
        self._refills_s: dict[int, float] = {}

    def outcome(self, row: _Row, rng: random.Random) -> Outcome:
        """How a round of this row goes."""
        if self.setup.draft is None:
            return PLAIN_ROUND
        table = self._ways.get(row.key)
        if table is None:
            table = self._ways[row.key] = [None] * row.size
        ways, sums = table[row.start] or self._work_out(table, row)
        return ways[0] if len(ways) == 1 else rng.choices(ways, cum_weights=sums)[0]

    def acceptance(self, prompt: Prompt) -> DraftAcceptance:
        if prompt.digest not in self._acceptances:
            assert self.setup.draft is not None
            acceptance = self._simulator.evidence.acceptance(self.setup.draft, prompt)
            check_length(acceptance, self.setup.length)
            self._acceptances[prompt.digest] = acceptance
        return self._acceptances[prompt.digest]

    def seconds(self, num_rows: int, shape: StepShape) -> float:
        """Of a round of a batch of `num_rows`."""
        key = self._simulator.sizes[num_rows], shape
        seconds = self._seconds.get(key)
        if seconds is None:
            seconds = self._seconds[key] = self._simulator.forecasters[key[0]].round_s(self.setup, shape)
        return seconds

    def refill_s(self, num_rows: int) -> float:
        """Of a prefill that a batch of `num_rows` waits for."""
        size = self._simulator.sizes[num_rows]
        if size not in self._refills_s:
            self._refills_s[size] = self._simulator.forecasters[size].refill_s(self.setup.draft)
        return self._refills_s[size]

    def _work_out(self, table: list[Ways | None], row: _Row) -> Ways:
        _, size, most = row.key
        length = min(self.setup.length, most - row.start - 1)
        outcomes = list(round_outcomes(self.acceptance(row.prompt), row.start, length, size))
        ways = [(outcome.proposed, outcome.accepted, outcome.by_model) for outcome in outcomes]
        answer = ways, list(accumulate(outcome.prob for outcome in outcomes))
        table[row.start] = answer
        return answer


class _Run:
    """One stream being served."""

    def __init__(self, simulator: Simulator, stream: Stream, seed: int, noise: Sequence[float], labelled: bool) -> None:
        self._simulator = simulator
        self._labelled = labelled
        self._num_requests = 0
        self._workload = simulator.workload
        self._waiting = deque(stream.requests)
        self._rng = random.Random(f"{seed} rng")
        self._noise_rng = random.Random(f"{seed} noise")
        self._noise = noise
        self._plain = simulator.arm(PLAIN)
        self._rows: list[_Row] = []
        self._infos: tuple[RequestInfo, ...] = ()
        self._domain: str | None = None
        self._arms: dict[int, tuple[Setup, _Arm]] = {}  # by identity, as hashing a setup takes long
        self._in_use: _Arm | None = None
        self._rounds_on = 0
        self._refills = 0
        self._seconds = 0.0
        self._results: list[RoundResult] = []

    def play(
        self, controller: RoundController, disturbance: Disturbance | None, num_rounds: int | None, delay: int
    ) -> Record:
        late: deque[RoundReport] = deque()
        again = tuple(self._waiting)
        self._let_in()
        while self._rows and (num_rounds is None or len(self._results) < num_rounds):
            if num_rounds is not None and len(self._waiting) < len(self._rows) + 1:
                self._waiting.extend(again)
            num_rows, domain = len(self._rows), self._domain
            decision = controller.choose(
                batch_size=num_rows,
                context_length=self._workload.context_length,
                domain=domain,
                temperature=self._workload.temperature,
                requests=self._infos,
            )
            starter, arm = self._switch_to(decision.setup)
            factor, outcomes = self._outcomes(arm, disturbance)
            shape = _shape(arm, self._rows, outcomes)
            round_s = factor * arm.seconds(num_rows, shape)
            tokens = _advance(arm, self._rows, outcomes, shape)
            refill_s, plain_refill_s = starter.refill_s(num_rows), self._plain.refill_s(num_rows)
            rows = tuple([RoundCount(proposed, accepted) for proposed, accepted, _ in outcomes])
            extra_s = factor * self._refills * max(0.0, refill_s - plain_refill_s)
            late.append(RoundReport(decision, rows, round_s, 0.0 if delay else extra_s))
            if len(late) > delay:
                controller.observe(late.popleft())
            phase = self._rows[-1].phase
            done = [row.info.id for row in self._rows if row.start >= row.size]
            if done:
                controller.finish(done)
                self._rows = [row for row in self._rows if row.start < row.size]
                self._regroup()
            seconds = round_s + factor * self._refills * refill_s
            plain_s = tokens / num_rows * self._plain.seconds(num_rows, PLAIN_SHAPE)
            plain_s = factor * (plain_s + self._refills * plain_refill_s)
            self._seconds += seconds
            played = RoundResult(
                decision.setup, domain, num_rows, tokens, seconds, plain_s, factor, decision.probe, phase
            )
            self._results.append(played)
            self._let_in()
        return Record(rounds=tuple(self._results))

    def _let_in(self) -> None:
        """Requests enter while fewer rows are in use than they allow; the draft in use takes in their prompts."""
        self._refills = 0
        if not self._waiting or len(self._rows) >= self._waiting[0].concurrency:
            return
        workload, traces = self._workload, self._simulator.evidence.traces
        while self._waiting and len(self._rows) < self._waiting[0].concurrency:
            request = self._waiting.popleft()
            digest = request.prompt.digest
            most = min(workload.max_new_tokens, request.most_tokens or workload.max_new_tokens)
            if digest not in traces:
                raise NotMeasuredError(f"a prompt of domain {request.prompt.domain!r} has no target trace: {digest}")
            self._num_requests += 1
            domain = request.prompt.domain if self._labelled else None
            info = RequestInfo(self._num_requests, domain, workload.context_length, workload.temperature)
            row = _Row(request, min(most, len(traces[digest].token_ids)), most, info)
            self._refills += bool(self._rows)  # the first of a batch keeps nobody waiting
            if self._in_use is not None and self._in_use.model is not None:
                row.num_cached[self._in_use.model] = row.prompt_tokens
            if row.start < row.size:
                self._rows.append(row)
        self._regroup()

    def _regroup(self) -> None:
        """What the controller is told of the rows."""
        self._infos = tuple([row.info for row in self._rows])
        domains = {row.domain for row in self._rows}
        self._domain = domains.pop() if len(domains) == 1 else None

    def _switch_to(self, setup: Setup) -> tuple["_Arm", "_Arm"]:
        """(the arm that was in use when the rows came in, the one in use now).

        As in an engine, the first pick of all is made before the first prompts are taken in.
        """
        before = self._in_use
        if id(setup) not in self._arms:
            self._arms[id(setup)] = setup, self._simulator.arm(setup)
        arm = self._arms[id(setup)][1]
        if before is None and arm.model is not None:
            for row in self._rows:
                row.num_cached[arm.model] = row.prompt_tokens
        same_draft = before is arm or (before is not None and before.setup.draft == setup.draft)
        self._rounds_on = self._rounds_on + 1 if same_draft else 0
        self._in_use = arm
        return before or arm, arm

    def _outcomes(self, arm: "_Arm", disturbance: Disturbance | None) -> tuple[float, list[Outcome]]:
        """(factor of this round's time, how it goes for every row)."""
        factor = self._noise[int(self._noise_rng.random() * len(self._noise))]
        outcomes = [arm.outcome(row, self._rng) for row in self._rows]
        if disturbance is None:
            return factor, outcomes
        moment = Moment(len(self._results), self._seconds, arm.setup, self._rounds_on)
        fails = disturbance.fails(moment)
        if fails:
            rng = self._rng
            outcomes = [(proposed, _cut(accepted, fails, rng), by_model) for proposed, accepted, by_model in outcomes]
        return factor * disturbance.slows(moment), outcomes


def _cut(accepted: int, fails: float, rng: random.Random) -> int:
    """Accepted tokens where each is rejected with this probability."""
    if fails >= 1.0:
        return 0
    return next((number for number in range(accepted) if rng.random() < fails), accepted)


def _shape(arm: _Arm, rows: Sequence[_Row], outcomes: Sequence[Outcome]) -> StepShape:
    """What the batch runs (see `Sample.shapes`)."""
    widest = max([proposed for proposed, _, _ in outcomes]) + 1
    if arm.model is None:
        return StepShape(widest)
    steps = furthest = 0
    for row, (proposed, _, by_model) in zip(rows, outcomes, strict=True):
        if by_model:
            steps = max(steps, proposed)
            furthest = max(furthest, row.behind(arm.model))
    return StepShape(widest, steps, catch_up_width(furthest) if steps else 0)


def _advance(arm: _Arm, rows: Sequence[_Row], outcomes: Sequence[Outcome], shape: StepShape) -> int:
    """Moves every row on; the tokens that were emitted. A row further behind than the first step got nothing of it."""
    _, steps, width = shape
    tokens = 0
    for row, (_, accepted, by_model) in zip(rows, outcomes, strict=True):
        if arm.model is not None and steps and row.behind(arm.model) <= width:
            row.num_cached[arm.model] = row.length + (min(accepted, steps - 1) if by_model else 0)
        start = min(row.size, row.start + accepted + 1)  # no bonus token follows an accepted end
        tokens += start - row.start
        row.start = start
    return tokens
