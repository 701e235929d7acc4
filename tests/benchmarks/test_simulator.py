"""The simulated server on made-up evidence: its rounds are those of a replay, its seconds the forecast's.

Prices that tell shapes apart make what a batch ran readable from what it took.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from profiles.acceptance.batch_replay import draw_rounds, replay
from profiles.acceptance.expected_rounds import catch_up_width, expected_rounds
from profiles.engines.base import RoundDecision, RoundReport
from profiles.records.core import PLAIN, Draft, Prompt, Setup
from profiles.records.errors import InputError, NotMeasuredError
from tests.benchmarks import traffic
from tests.benchmarks.controllers import Controller, Fixed, picked
from tests.benchmarks.simulator import Record, Simulator
from tests.benchmarks.traffic import Disturbance, Phase, Request, Stream
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET, FakeEngine, prompts
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster

LENGTHS = (1, 2, 3, 4, 5, 6)
BOTH = Draft(kind="composite", model=DRAFT_A.model, max_match=NGRAM.max_match, min_match=NGRAM.min_match)
SETUPS = (PLAIN, *(Setup(draft=draft, length=length) for draft in (DRAFT_A, NGRAM, BOTH) for length in (2, 5)))
PROMPTS = (*prompts(6, "code"), *prompts(6, "prose"))
every_setup = pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)


class Prices:
    """In place of a forecaster: a shape's seconds tell it, a prefill takes no time."""

    def round_s(self, setup: Setup, shape: tuple[int, int, int]) -> float:
        width, steps, first = shape
        return float(width * 1_000_000 + steps * 10_000 + first)

    def refill_s(self, draft: Draft | None) -> float:
        return 0.0


class Script(Controller):
    """Picks what `setup_of` says of the round's number; records queries and reports."""

    def __init__(self, setup_of: Callable[[int], Setup]) -> None:
        self.queries: list[tuple[int, str | None]] = []
        self.reports: list[RoundReport] = []
        self._setup_of = setup_of

    def choose(self, *, batch_size: int | None = None, domain: str | None = None, **_: object) -> RoundDecision:
        setup = self._setup_of(len(self.queries))
        self.queries.append((batch_size or 1, domain))
        return picked(setup)

    def observe(self, report: RoundReport) -> bool:
        self.reports.append(report)
        return True


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    engine = FakeEngine(keep_by_domain={"code": 0.8, "prose": 0.4})
    engine.drafts = (DRAFT_A, NGRAM, BOTH)
    return gather(engine, GREEDY, PROMPTS, LENGTHS)


@pytest.fixture(scope="module")
def forecaster(evidence: Evidence) -> Forecaster:
    return Forecaster(evidence, GREEDY, TARGET.run_digest)


@pytest.fixture
def simulator(evidence: Evidence, forecaster: Forecaster) -> Simulator:
    return Simulator(GREEDY, evidence, {1: forecaster, 4: forecaster})


@pytest.fixture
def priced(evidence: Evidence) -> Simulator:
    forecasters = {1: Prices(), 4: Prices()}
    return Simulator(GREEDY, evidence, forecasters)  # type: ignore[arg-type]


def queue(concurrency: int, chosen: Sequence[Prompt] = PROMPTS) -> Stream:
    return Stream(name="queue", requests=tuple(Request(prompt, concurrency) for prompt in chosen))


def shapes_of(record: Record) -> list[tuple[int, int, int]]:
    """What `Prices` made of them."""
    seconds = [int(result.seconds) for result in record.rounds]
    return [(value // 1_000_000, value % 1_000_000 // 10_000, value % 10_000) for value in seconds]


@every_setup
def test_at_batch_1_it_replays_the_traces(simulator: Simulator, evidence: Evidence, setup: Setup) -> None:
    """With a fixed setup, batch 1 goes through exactly the rounds of a replay."""
    controller = Script(lambda _: setup)
    simulator.serve(queue(1), controller)
    wanted = []
    for prompt in PROMPTS:
        acceptance = evidence.acceptance(setup.draft, prompt) if setup.draft else None
        trace = evidence.traces[prompt.digest]
        wanted += draw_rounds(trace, acceptance, setup.length, GREEDY.max_new_tokens, rng=random.Random(0))
    assert [report.rows for report in controller.reports] == [
        ((outcome.proposed, outcome.accepted),) for outcome in wanted
    ]


@every_setup
def test_at_batch_1_it_takes_what_the_forecast_says(
    simulator: Simulator, evidence: Evidence, forecaster: Forecaster, setup: Setup
) -> None:
    """Seconds at batch 1 without noise are the forecaster's own; tokens are all but the first of each output."""
    record = simulator.serve(queue(1), Fixed(setup))
    seconds = 0.0
    for prompt in PROMPTS:
        acceptance = evidence.acceptance(setup.draft, prompt) if setup.draft else None
        walked = expected_rounds(evidence.traces[prompt.digest], acceptance, setup.length, GREEDY.max_new_tokens)
        seconds += sum(count * forecaster.round_s(setup, shape) for shape, count in walked.shapes.items())
    assert record.seconds == pytest.approx(seconds, rel=1e-9)
    assert record.tokens == len(PROMPTS) * (GREEDY.max_new_tokens - 1)
    assert record.tok_per_s == pytest.approx(forecaster.forecast(setup, PROMPTS).tok_per_s.estimate, rel=1e-6)
    assert record.over_plain == pytest.approx(forecaster.forecast(setup, PROMPTS).speedup.estimate, rel=1e-6)


@every_setup
def test_in_a_batch_it_runs_what_a_replay_runs(priced: Simulator, evidence: Evidence, setup: Setup) -> None:
    """The shapes a full batch runs are those of `profiles.acceptance.batch_replay`, catch-up widths included."""
    record = priced.serve(queue(4), Fixed(setup))
    rounds = [
        draw_rounds(
            evidence.traces[prompt.digest],
            evidence.acceptance(setup.draft, prompt) if setup.draft else None,
            setup.length,
            GREEDY.max_new_tokens,
            rng=random.Random(0),
        )
        for prompt in PROMPTS
    ]
    wanted: Counter[tuple[int, int, int]] = Counter()
    for run in replay(rounds, 4):
        wanted.update(run.shapes)
    ran: Counter[tuple[int, int, int]] = Counter()
    for shape, played in zip(shapes_of(record), record.rounds, strict=True):
        ran[shape] += played.num_rows
    assert ran == wanted


def test_rows_wait_for_prefills(simulator: Simulator, forecaster: Forecaster) -> None:
    """Every prefill but the first of an empty batch is charged to the rows that wait, plain decoding's at its own."""
    stream = queue(4)
    setup = Setup(draft=DRAFT_A, length=3)
    controller = Script(lambda _: setup)
    record = simulator.serve(stream, controller)
    waited_s = (len(PROMPTS) - 1) * forecaster.refill_s(DRAFT_A)
    assert record.seconds == pytest.approx(sum(report.seconds for report in controller.reports) + waited_s)


def test_a_draft_switched_to_takes_in_what_it_missed(priced: Simulator) -> None:
    """From plain decoding, prompt and output; back after a while, only what came meanwhile."""
    setup = Setup(draft=DRAFT_A, length=1)
    picks = [PLAIN] * 10 + [setup] + [PLAIN] * 5 + [setup]
    controller = Script(lambda number: picks[number] if number < len(picks) else PLAIN)
    shapes = shapes_of(priced.serve(queue(1, PROMPTS[:1]), controller))
    num_prompt = len(PROMPTS[0].token_ids)
    assert shapes[10] == (2, 1, catch_up_width(num_prompt + 11))
    (accepted,) = [accepted for _, accepted in controller.reports[10].rows]
    assert shapes[16] == (2, 1, catch_up_width(accepted + 1 + 5))
    assert all(shape == (1, 0, 0) for number, shape in enumerate(shapes) if number not in (10, 16))


def test_a_new_row_is_taken_in_by_the_draft_in_use(priced: Simulator) -> None:
    """With the prompt, as part of its prefill: its first round is as narrow as any."""
    setup = Setup(draft=DRAFT_A, length=2)
    shapes = shapes_of(priced.serve(queue(1), Script(lambda _: setup)))
    assert {first for _, steps, first in shapes if steps} == {2}


def test_one_domain_or_none(simulator: Simulator) -> None:
    """A controller is told the rows in use, and their domain where they agree."""
    controller = Script(lambda _: PLAIN)
    stream = Stream(name="two", requests=(Request(PROMPTS[0], 2), Request(PROMPTS[6], 2, 10), Request(PROMPTS[1], 1)))
    simulator.serve(stream, controller)
    assert controller.queries[0] == (2, None)
    assert controller.queries[9:][:1] == [(1, "code")]
    assert controller.queries[-1] == (1, "code")


def test_the_same_seed_gives_the_same_record(simulator: Simulator) -> None:
    """And another one other noise, of the machine as a whole: against plain decoding it cancels."""
    noise = (0.9, 1.0, 1.1)
    stream, controller = queue(4), Fixed(Setup(draft=NGRAM, length=4))
    first = simulator.serve(stream, controller, seed=1, noise=noise)
    assert first == simulator.serve(stream, controller, seed=1, noise=noise)
    other = simulator.serve(stream, controller, seed=2, noise=noise)
    assert other.seconds != first.seconds
    assert other.tokens == first.tokens
    assert other.over_plain == pytest.approx(first.over_plain, rel=0.01)


def test_sampled_drafts_are_drawn_by_seed() -> None:
    """At a temperature above 0 rounds are one way through the trace, drawn by the seed."""
    workload = replace(GREEDY, temperature=0.8)
    evidence = gather(FakeEngine(), workload, PROMPTS[:2], LENGTHS)
    server = Simulator(workload, evidence, {1: Forecaster(evidence, workload, TARGET.run_digest)})
    records = [server.serve(queue(1, PROMPTS[:2]), Fixed(SETUPS[2]), seed=seed) for seed in (1, 1, 2)]
    assert records[0] == records[1] != records[2]


def test_weather(simulator: Simulator) -> None:
    """A spike slows plain decoding just as much; a spoilt round keeps nothing of what was proposed."""
    stream, setup = queue(1), Setup(draft=DRAFT_A, length=3)
    calm = simulator.serve(stream, Fixed(setup))
    slow = simulator.serve(stream, Fixed(setup), disturbance=Disturbance(slows=lambda _: 3.0))
    assert slow.seconds == pytest.approx(3.0 * calm.seconds)
    assert slow.over_plain == pytest.approx(calm.over_plain)
    controller = Script(lambda _: setup)
    spoilt = simulator.serve(stream, controller, disturbance=Disturbance(fails=lambda _: 1.0))
    assert {accepted for report in controller.reports for _, accepted in report.rows} == {0}
    assert spoilt.over_plain < 1.0 < calm.over_plain


def test_an_ambush_waits_for_the_draft(simulator: Simulator) -> None:
    """The first rounds after every switch are spoilt, and only these."""
    setup = Setup(draft=NGRAM, length=3)
    controller = Script(lambda number: setup if number % 20 >= 10 else PLAIN)
    simulator.serve(queue(1), controller, disturbance=traffic.useless_at_first(4))
    accepted_by_phase = [0] * 20
    for number, report in enumerate(controller.reports):
        accepted_by_phase[number % 20] += report.rows[0][1]
    assert accepted_by_phase[10:14] == [0] * 4
    assert min(accepted_by_phase[14:]) > 0


def test_worst_window(simulator: Simulator) -> None:
    """The least of all windows of that many rounds, and of the whole record when it is shorter."""
    setup = Setup(draft=DRAFT_A, length=4)
    record = simulator.serve(
        queue(1), Fixed(setup), disturbance=Disturbance(fails=lambda moment: float(50 <= moment.number < 80))
    )
    by_hand = min(
        sum(result.plain_s for result in record.rounds[at : at + 20])
        / sum(result.seconds for result in record.rounds[at : at + 20])
        for at in range(len(record.rounds) - 19)
    )
    assert record.worst_window(20) == pytest.approx(by_hand)
    assert record.worst_window(10**6) == pytest.approx(record.over_plain)


def test_what_was_not_measured_is_refused(simulator: Simulator) -> None:
    """A larger batch, an unknown prompt and a longer length are named."""
    with pytest.raises(InputError, match="batch 5"):
        simulator.serve(queue(5), Fixed(PLAIN))
    with pytest.raises(NotMeasuredError, match="poem"):
        simulator.serve(queue(1, prompts(1, "poem")), Fixed(PLAIN))
    with pytest.raises(NotMeasuredError, match="lengths up to 6"):
        simulator.serve(queue(1), Fixed(Setup(draft=NGRAM, length=9)))


def test_streams_are_drawn_by_seed() -> None:
    """The same seed gives the same stream; every prompt of a domain comes before any comes again."""
    stream = traffic.steady(PROMPTS, 3, num_requests=24)
    assert stream == traffic.steady(PROMPTS, 3, num_requests=24) != traffic.steady(PROMPTS, 4, num_requests=24)
    assert [request.prompt.domain for request in stream.requests[:4]] == ["code", "prose", "code", "prose"]
    assert Counter(request.prompt for request in stream.requests) == dict.fromkeys(PROMPTS, 2)


def test_shapes_of_streams() -> None:
    """Domains come one after the other; batches go up and down again, jump, or flip with short requests."""
    shifting = traffic.shifting(PROMPTS, 0, domains=("code", "prose", "code"), num_requests=5)
    assert [request.prompt.domain for request in shifting.requests] == ["code"] * 5 + ["prose"] * 5 + ["code"] * 5
    ramp = traffic.batch_shift(PROMPTS, 0, batches=(1, 4), turns=2)
    assert [request.concurrency for request in ramp.requests] == [1, 1, *[4] * 8, 1, 1]
    assert [request.phase for request in ramp.requests] == [0, 0, *[1] * 8, 2, 2]
    assert traffic.bursty(PROMPTS, 0, batches=(1, 4)).most_rows == 4
    flips = traffic.flipping(PROMPTS, 0, batch=4, num_flips=2)
    assert [request.most_tokens for request in flips.requests] == [None, 4, 4, 4, None, 4, 4, 4]


def test_streams_refuse_what_cannot_be() -> None:
    """A phase of nothing, a domain without prompts and a stream without requests are named."""
    with pytest.raises(InputError, match="0 requests"):
        Phase(num_requests=0)
    with pytest.raises(InputError, match="0 rows"):
        Phase(num_requests=1, concurrency=0)
    with pytest.raises(InputError, match="requests of 0 tokens"):
        Phase(num_requests=1, most_tokens=0)
    with pytest.raises(InputError, match="poem"):
        traffic.shifting(PROMPTS, 0, domains=("poem",))
    with pytest.raises(InputError, match="no requests"):
        Stream(name="empty", requests=())
