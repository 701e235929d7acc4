"""The report data of a run: candidates with state and reason, acceptance with intervals, its JSON form."""

import json
from dataclasses import replace

import pytest

from profiles.records.core import PLAIN, Draft, Prompt, Workload
from profiles.records.errors import BadNumbersError, InputError
from profiles.records.evidence import Acceptance, TargetTrace
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts
from tests.support.policies import CREATED
from tuner.pipeline.pipeline import Outcome, Tuner, Watch
from tuner.pipeline.trial import Options
from tuner.policy.policy import Policy
from tuner.report.build import report_data
from tuner.report.data import Candidate, PointFigures, ReportData
from tuner.report.tables import document

TWO_DOMAINS = (*prompts(48, "code"), *prompts(48, "prose"))
LENGTHS = (1, 2, 3, 4)


class FailingLookups(FakeEngine):
    """Its n-gram draft has logits that are not finite, as a broken model would."""

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        if draft == NGRAM:
            raise BadNumbersError("the logits of the draft are not finite")
        return super().trace_draft(workload, prompt, trace, draft, max_length)


def outcome_of(engine: FakeEngine, watch: Watch | None = None, *loads: Workload) -> Outcome:
    return Tuner(engine, Options(lengths=LENGTHS), watch).tune([(load, TWO_DOMAINS) for load in loads or (GREEDY,)])


def policy_of(outcome: Outcome) -> Policy:
    return Policy(created=CREATED, target=TARGET, environment=MACHINE, choices=outcome.choices)


def report_data_of(engine: FakeEngine, watch: Watch | None = None) -> ReportData:
    outcome = outcome_of(engine, watch)
    return report_data(outcome, policy_of(outcome))


@pytest.fixture(scope="module")
def made() -> ReportData:
    """Code keeps the draft model's tokens often, prose never does."""
    engine = FakeEngine(keep_by_domain={"code": 0.9, "prose": 0.0})
    engine.drafts = (DRAFT_A,)
    return report_data_of(engine)


def by_name(point: PointFigures) -> dict[str, Candidate]:
    return {one.setup_name: one for one in point.candidates}


def test_every_candidate_stands_in_it(made: ReportData) -> None:
    """Plain decoding and each draft at each length, at every anchor, with a forecast, a round split and a reason."""
    assert [point.choice.domain for point in made.points] == ["mixed", "code", "prose"]
    for point in made.points:
        assert set(by_name(point)) == {"plain", "draft-a k=1", "draft-a k=2", "draft-a k=3", "draft-a k=4"}
        for one in point.candidates:
            assert one.forecast_speedup is not None
            assert one.round_split.verify_s == pytest.approx(0.005, rel=0.2)
            assert one.reason
    plain = by_name(made.points[0])["plain"]
    assert (plain.draft_name, plain.length, plain.state, plain.acceptance_length) == ("plain", 0, "baseline", 1.0)


def test_states_follow_the_run() -> None:
    """States are those of the outcome: proven with the proof's figures, raced, pruned, and forecast only."""
    engine = FakeEngine(keep=0.7)
    engine.drafts = (DRAFT_A,)
    outcome = outcome_of(engine)
    made = report_data(outcome, policy_of(outcome))
    for point, figures, choice in zip(outcome.points, made.points, outcome.choices, strict=True):
        assert point.race is not None
        states = {name: one.state for name, one in by_name(figures).items()}
        assert choice.proven
        assert states[choice.setup.name] == "proven"
        assert {name for name, state in states.items() if state == "pruned in the race"} == {
            setup.name for setup in point.race.pruned
        }
        raced = {setup.name for setup in point.race.speedups} - {choice.setup.name}
        assert {name for name, state in states.items() if state == "raced"} == raced
        won = by_name(figures)[choice.setup.name]
        assert won.measured_speedup == point.measured.speedup
        assert won.measured_tok_per_s == point.measured.tok_per_s
        assert won.race_speedup == point.race.speedups[choice.setup]
        assert by_name(figures)["plain"].measured_tok_per_s == point.measured.plain_tok_per_s


def test_a_draft_not_worth_a_race(made: ReportData) -> None:
    """Where the forecast is below plain decoding, the reason says so, and the choice is plain."""
    prose = made.points[2]
    assert prose.choice.setup == PLAIN
    for name, one in by_name(prose).items():
        if name != "plain":
            assert one.state == "forecast only"
            assert "not above plain decoding" in one.reason
            assert one.race_speedup is one.measured_speedup is None


def test_a_failed_draft_is_listed_with_its_reason() -> None:
    """Its candidate is infeasible and has no figure; the other draft goes on."""
    made = report_data_of(FailingLookups(keep=0.9))
    (failed,) = [one for one in made.points[0].candidates if one.draft_name == NGRAM.name]
    assert (failed.state, failed.reason) == ("infeasible", "the logits of the draft are not finite")
    assert failed.forecast_speedup is failed.round_split is None
    assert [draft.name for draft in made.drafts] == ["draft-a", NGRAM.name]
    assert made.points[0].choice.proven


def test_a_winner_that_is_not_proven() -> None:
    """The candidate of too small a proof is `not proven`, with the shortfall as its reason."""
    outcome = Tuner(FakeEngine(keep=0.9), Options(lengths=LENGTHS)).tune([(GREEDY, prompts(11))])
    made = report_data(outcome, policy_of(outcome))
    (one,) = [one for one in made.points[0].candidates if one.state == "not proven"]
    assert "of only 7 prompts, 8 are needed (12 in all)" in one.reason
    assert one.measured_speedup is not None
    shown = document(policy_of(outcome), cost={}, store=None, policy_path=None)["not_proven"]
    assert (shown["setup"], shown["num_prompts"]) == (one.setup_name, 7)
    assert shown["speedup"]["low"] == one.measured_speedup.low
    assert shown["minimum_detectable_speedup"] > 1.0


def test_a_budget_that_ends_early() -> None:
    """Without evidence there are no candidates or curves; the reason is kept."""
    made = report_data_of(FakeEngine(), Watch(out_of_time=lambda: True))
    assert made.points[0].candidates == ()
    assert made.loads[0].curves == ()
    assert made.points[0].stopped == "the budget ended before anything could be compared, after loading: give more"
    assert ReportData.from_json(made.to_json()) == made


def test_loads_are_kept_apart() -> None:
    """Two temperatures are two loads, each with its own curves."""
    outcome = outcome_of(FakeEngine(keep=0.9), None, GREEDY, replace(GREEDY, temperature=0.7))
    made = report_data(outcome, policy_of(outcome))
    assert [len(load.points) for load in made.loads] == [3, 3]
    assert made.loads[0].curves != made.loads[1].curves


def test_acceptance_by_position(made: ReportData) -> None:
    """Per draft over all domains and in each; on code about 0.9 to the power of the position, on prose nothing."""
    curves = {curve.domain: curve for curve in made.loads[0].curves}
    assert list(curves) == ["mixed", "code", "prose"]
    assert [position.position for position in curves["code"].positions] == [1, 2, 3, 4]
    for position in curves["code"].positions:
        assert position.accepted.estimate == pytest.approx(0.9**position.position, abs=0.06)
        assert position.accepted.low < position.accepted.estimate < position.accepted.high
    assert [position.accepted.estimate for position in curves["prose"].positions] == [0.0, 0.0, 0.0, 0.0]
    assert all(0.0 < position.accepted.high < 0.5 for position in curves["prose"].positions)
    assert curves["mixed"].num_prompts == curves["code"].num_prompts + curves["prose"].num_prompts


def test_json_round_trip(made: ReportData) -> None:
    """Through text and back it is the same record, and the text holds no other than JSON's types."""
    raw = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert ReportData.from_json(raw) == made
    assert raw["version"] == 3


def test_what_earlier_versions_drew_is_ignored(made: ReportData) -> None:
    """A timeline of a simulated server, and step times by width; their report data is still read."""
    raw = made.to_json() | {"timeline": {"spans": [{"start_s": 0.0}], "best_single_name": "plain"}, "standing": []}
    for load, key in zip(raw["loads"] * 2, ("step_time_curves", "staircases"), strict=True):
        load[key] = [{"name": "target", "widths": [{"width": 1, "median_s": 0.005}]}]
    assert ReportData.from_json(raw) == made


def test_control_characters_are_not_shown(made: ReportData) -> None:
    """A domain with a control character, U+FFFE or half a surrogate pair, which no SVG may hold."""
    text = json.dumps(made.to_json()).replace('"code"', '"co\\u000bd\\ufffe\\ud800"')
    domains = {curve.domain for curve in ReportData.from_json(json.loads(text)).loads[0].curves}
    assert domains == {"mixed", "co d  ", "prose"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 4}, "report data version 4 is newer than version 3"),
        ({"version": 0}, "version 0: this draftpick knows 3"),
        ({"loads": []}, "report data needs a load"),
        ({"loads": "none"}, 'report data.loads is "none": Expected `array`'),
        ({"created": 5}, "report data.created is 5: Expected `str`"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_json_refusals(made: ReportData, change: dict[str, object], says: str) -> None:
    """What is not a report data is refused in one line that names the value."""
    with pytest.raises(InputError, match=says) as refused:
        ReportData.from_json(made.to_json() | change)
    assert "\n" not in str(refused.value)


def test_json_refuses_what_is_deeper(made: ReportData) -> None:
    """An unknown state and a missing key are named with their place."""
    raw = made.to_json()
    raw["loads"][0]["points"][0]["candidates"][1]["state"] = "winning"
    with pytest.raises(InputError, match=r"candidates\[1\]\.state is \"winning\": Invalid enum value"):
        ReportData.from_json(raw)
    raw = made.to_json()
    del raw["target"]
    with pytest.raises(InputError, match="missing required field `target`"):
        ReportData.from_json(raw)
    with pytest.raises(InputError, match="report data is null: Expected `object`"):
        ReportData.from_json(None)
