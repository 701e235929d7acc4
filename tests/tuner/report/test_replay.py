"""The report's timeline: a selector replayed on a run's own evidence, in the dossier and on the page."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import Sample
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, TARGET, FakeEngine, prompts
from tests.support.policies import CREATED
from tests.support.serving import NATIVE, FakeServer
from tuner.pipeline.pipeline import Options, Tuner
from tuner.policy.policy import Policy
from tuner.report.build import report_data
from tuner.report.data import ReportData
from tuner.report.page import write

LOADS = [
    (replace(GREEDY, batch_size=size), (*prompts(30, "code"), *prompts(30, "prose"))) for size in (GREEDY.batch_size, 4)
]


def dossier_of(engine: FakeEngine) -> ReportData:
    outcome = Tuner(engine, Options(lengths=(1, 2, 4))).tune(LOADS)
    policy = Policy(created=CREATED, target=TARGET, environment=MACHINE, choices=outcome.choices, prior=outcome.prior)
    return report_data(outcome, policy)


@pytest.fixture(scope="module")
def made() -> ReportData:
    return dossier_of(FakeEngine(keep_by_domain={"code": 0.9, "prose": 0.3}))


def test_it_goes_through_every_load_and_domain(made: ReportData) -> None:
    """Batch 1, 4 and 1 again, both domains in each; stretches follow each other without a gap."""
    assert made.timeline is not None
    spans = made.timeline.spans
    assert {(span.batch_size, span.domain) for span in spans} >= {
        (size, one) for size in (1, 4) for one in ("code", "prose")
    }
    assert spans[0].batch_size == spans[-1].batch_size == 1
    for before, after in itertools.pairwise(spans):
        assert after.start_s == pytest.approx(before.start_s + before.seconds)
    assert made.timeline.best_single_name in {one.setup_name for anchor in made.anchors for one in anchor.candidates}


def test_it_goes_through_json_and_onto_the_page(made: ReportData, tmp_path: Path) -> None:
    """The same record comes back; the page draws it for a screen and for a phone."""
    assert ReportData.from_json(json.loads(json.dumps(made.to_json()))) == made
    write(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("How a selector would steer") == 1
    assert page.count("timeline-wide") >= 1 <= page.count("timeline-narrow")
    write(replace(made, timeline=None), tmp_path / "without.html")
    assert "How a selector would steer" not in (tmp_path / "without.html").read_text(encoding="utf-8")


class FailsInABatch(FakeEngine):
    """Its model draft runs out of memory from batch 4 on."""

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        if workload.batch_size > 1 and any(setup.draft == DRAFT_A for setup in setups):
            raise EngineError("the device is full")
        return super().run_together(workload, prompts, setups, purpose)


def test_a_draft_that_failed_at_one_batch_is_left_out() -> None:
    """The best single setup is one that ran everywhere, and the selector drafts with the model at batch 1 only."""
    found = dossier_of(FailsInABatch(keep=0.9)).timeline
    assert found is not None
    assert DRAFT_A.name not in found.best_single_name
    assert {span.batch_size for span in found.spans if span.draft_name == DRAFT_A.name} <= {1}


def test_a_native_draft_among_the_best_does_not_hide_it() -> None:
    """Where a draft that was only run is the choice, the timeline is of the others."""
    engine = FakeServer(keep=0.9)
    outcome = Tuner(engine, Options(lengths=(1, 2))).tune([(GREEDY, prompts(30))])
    native = replace(outcome.choices[0], setup=Setup(draft=NATIVE, length=2), proven=False)
    policy = Policy(
        created=CREATED, target=TARGET, environment=MACHINE, choices=(native, *outcome.choices[1:]), prior=outcome.prior
    )
    assert any(one.setup.draft == NATIVE for one in outcome.anchors[0].forecasts)
    shown = report_data(outcome, policy).timeline
    assert shown is not None
    assert NATIVE.name not in {span.draft_name for span in shown.spans}
