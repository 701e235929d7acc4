"""Decisions and the steps that verify their drafts, paired over joining and leaving requests; without vLLM."""

from types import SimpleNamespace
from typing import Any

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from profiles.records.core import PLAIN, Setup
from tests.support.policies import CODE_DRAFT
from tuner.selector.step_controller import StepController


class Recorder:
    """Decides `k` tokens, one less for each request that came before; keeps what it is told."""

    def __init__(self) -> None:
        self.k = 4
        self.reports: list[RoundReport] = []
        self.finished: list[str] = []

    def choose(self, *, requests: list[RequestInfo], per_request: bool) -> RoundDecision:
        setup = Setup(draft=CODE_DRAFT, length=self.k) if self.k else PLAIN
        lengths = tuple(self.k - index for index in range(len(requests))) if per_request else ()
        return RoundDecision(setup, True, 1, 512, "mixed", 0.0, requests=tuple(requests), lengths=lengths)

    def observe(self, report: RoundReport) -> bool:
        self.reports.append(report)
        return True

    def finish(self, ids: tuple[str, ...]) -> None:
        self.finished += ids


def controller(*, per_request: bool = False) -> tuple[StepController, Recorder]:
    recorder = Recorder()
    policy_file: Any = SimpleNamespace(selector=recorder)
    return StepController(policy_file, per_request=per_request), recorder


def play(steps: StepController, drafted: dict[str, int], at_s: float, *names: str, prefills: bool = False) -> None:
    """A step that verifies `drafted`, keeps all of it, and decides for `names`; it takes a second."""
    step = steps.verify(drafted, started_s=at_s, prefills=prefills)
    steps.decide(step, [RequestInfo(name) for name in names])
    emitted = {name: count + 1 for name, count in drafted.items()}
    steps.report(step, emitted, at_s + 1.0, idle=not names)


def test_a_step_is_reported_under_the_decision_before_it() -> None:
    """The first step verifies nothing; a request that joins is not of the round that is under way."""
    steps, recorder = controller()
    play(steps, {"a": 0}, 0.0, "a", prefills=True)
    assert recorder.reports == []
    play(steps, {"a": 4}, 1.25, "a")
    play(steps, {"a": 3, "b": 0}, 2.25, "a", "b", prefills=True)
    play(steps, {"b": 4}, 3.25)
    play(steps, {"c": 0}, 60.0, "c", prefills=True)
    play(steps, {"c": 4}, 61.0, "c")
    rows = [(report.ids, report.rows, report.seconds) for report in recorder.reports]
    assert rows == [
        (("a",), ((4, 4),), 1.25),  # from the end of the step before: the server was not idle
        (("a",), ((3, 3),), None),  # its seconds are also those of b's prompt
        (("b",), ((4, 4),), None),  # drafts for nobody, so it is no whole round
        (("c",), ((4, 4),), 1.0),
    ]
    assert [len(report.decision.requests) for report in recorder.reports] == [1, 1, 2, 1]


def test_rows_of_two_decisions_are_not_timed() -> None:
    """A request that was left out of a step keeps its older plan."""
    steps, recorder = controller()
    play(steps, {}, 0.0, "a", "b")
    play(steps, {"a": 4}, 1.0, "a")
    play(steps, {"a": 4, "b": 4}, 2.0, "a", "b")
    assert [(report.ids, report.seconds) for report in recorder.reports] == [
        (("a",), 1.0),
        (("a",), None),
        (("b",), None),
    ]


def test_a_change_of_length_is_not_timed() -> None:
    """Its step verifies one decision's tokens and drafts another's: seconds of neither."""
    steps, recorder = controller()
    decided = [4, 4, 0, 0, 0, 4, 4, 4]
    drafted = 0
    for number, k in enumerate(decided):
        recorder.k = k
        play(steps, {"a": drafted}, float(number), "a", prefills=number == 0)
        drafted = k
    timed = [(report.decision.setup.length, report.seconds is not None) for report in recorder.reports]
    assert timed == [(4, True), (4, False), (0, True), (0, True), (0, False), (4, True), (4, True)]


def test_lengths_by_request_and_requests_that_ended() -> None:
    """The batch drafts what its longest asks for; a finished request is forgotten here and by the selector."""
    steps, recorder = controller(per_request=True)
    step = steps.verify({}, started_s=0.0, prefills=True)
    assert steps.decide(step, [RequestInfo("a"), RequestInfo("b")]) == 4
    assert {name: plan.length for name, plan in steps.plans.items()} == {"a": 4, "b": 3}
    steps.forget(["a", "never seen"])
    assert set(steps.plans) == {"b"}
    assert recorder.finished == ["a", "never seen"]
    assert steps.decide(step, []) == 0
