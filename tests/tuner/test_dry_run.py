"""The rehearsal foresees the units a run measures, counts what is known, and leaves the book as it was."""

from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import digest_of
from profiles.records.errors import BadNumbersError
from store.evidence_store import EvidenceStore
from tests.support import fakes
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts, sql
from tuner.dry_run import dry_run
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession, tune

PROMPTS = (*prompts(40, "code"), *prompts(40, "prose"))
LOADS = [(GREEDY, PROMPTS)]
OPTIONS = Options(lengths=(1, 2, 3, 4))


def test_the_units_of_a_first_run_are_foreseen(tmp_path: Path) -> None:
    """Traces, acceptance, step times and calibration exactly; races and proofs as many as can come."""
    path = tmp_path / "evidence.db"
    foreseen = dry_run(FakeEngine(keep=0.9), LOADS, path, OPTIONS)
    assert not path.exists()
    with EvidenceStore.open(path) as evidence_store:
        done = tune(FakeEngine(keep=0.9), LOADS, TuningSession.of(evidence_store), OPTIONS, Watch())
    num_traced = foreseen.new_units["target trace"]
    assert foreseen.new_units["acceptance"] == 2 * num_traced
    assert (foreseen.new_units["step times"], foreseen.new_units["calibration"]) == (1, 3)
    assert 0 < foreseen.new_units["race"] <= 3 * (6 + 3 * 12)
    assert 30 < foreseen.new_units["proof"] <= 30 + 24 + 24
    assert 0.5 <= done.cost["measured_units"] / sum(foreseen.new_units.values()) <= 1.0
    assert foreseen.seconds > 0.0


def test_a_finished_run_leaves_nothing_to_measure(tmp_path: Path) -> None:
    """Every unit is known, nothing is added to the book, and no time is needed."""
    path = tmp_path / "evidence.db"
    with EvidenceStore.open(path) as evidence_store:
        done = tune(FakeEngine(keep=0.9), LOADS, TuningSession.of(evidence_store), OPTIONS, Watch())
    foreseen = dry_run(FakeEngine(keep=0.9), LOADS, path, OPTIONS)
    assert foreseen.new_units == {}
    assert foreseen.seconds == 0.0
    assert foreseen.known_units >= done.cost["measured_units"]
    assert sql(path, "SELECT count(*) FROM runs") == [(1,)]


def test_other_targets_in_the_store_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their runs, step times and choices are not copied; the units of the target itself are known."""
    path, loads = tmp_path / "evidence.db", [(GREEDY, prompts(14))]
    with EvidenceStore.open(path) as evidence_store:
        tune(FakeEngine(keep=0.9), loads, TuningSession.of(evidence_store), OPTIONS, Watch())
    assert dry_run(FakeEngine(keep=0.9), loads, path, OPTIONS).new_units == {}
    monkeypatch.setattr(fakes, "TARGET", replace(fakes.TARGET, digest=digest_of("another")))
    foreseen = dry_run(FakeEngine(keep=0.9), loads, path, OPTIONS)
    assert foreseen.known_units == 0
    assert foreseen.new_units["calibration"] == 3


def test_a_draft_that_fails_at_a_glance_is_not_counted(tmp_path: Path) -> None:
    """Its units would not be measured either."""

    class Failing(FakeEngine):
        def trace_draft(self, workload, prompt, trace, draft, max_length):  # type: ignore[no-untyped-def]
            if draft == DRAFT_A:
                raise BadNumbersError("draft draft-a: its logits are not finite")
            return super().trace_draft(workload, prompt, trace, draft, max_length)

    foreseen = dry_run(Failing(), LOADS, tmp_path / "evidence.db", OPTIONS)
    assert foreseen.new_units["acceptance"] == foreseen.new_units["target trace"]
    assert NGRAM in Failing().drafts


@pytest.mark.parametrize("since", ["", "2999-01-01T00:00:00+00:00"])
def test_old_timings_are_measured_again(tmp_path: Path, since: str) -> None:
    """Only where they are older than asked; traces do not age, but predictions may let another setup win."""
    path = tmp_path / "evidence.db"
    with EvidenceStore.open(path) as evidence_store:
        tune(FakeEngine(keep=0.9), LOADS, TuningSession.of(evidence_store), OPTIONS, Watch())
    foreseen = dry_run(FakeEngine(keep=0.9), LOADS, path, OPTIONS, since)
    assert foreseen.new_units["target trace"] == 53 if since else "target trace" not in foreseen.new_units
    assert ("step times" in foreseen.new_units) == bool(since)
