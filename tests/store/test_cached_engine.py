"""The remembering engine never pays twice: it resumes after a failure, and failures are never numbers."""

from dataclasses import replace

import pytest

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Setup
from profiles.records.errors import EngineError, InputError, OutOfMemoryError, StoreError
from profiles.records.evidence import Sample
from store.cached_engine import CachedEngine
from store.database import Location
from store.evidence_store import EvidenceStore, Scope
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts
from tests.support.servers import ask

PROMPTS = prompts(3)
A4 = Setup(draft=DRAFT_A, length=4)


def measure_all(engine: Engine) -> list[object]:
    """Three target traces, six acceptances, a sweep, three units of runs: 13 units."""
    found: list[object] = []
    for prompt in PROMPTS:
        trace = engine.trace_target(GREEDY, prompt)
        found += [trace, *(engine.trace_draft(GREEDY, prompt, trace, draft, 4) for draft in engine.drafts)]
    found.append(engine.time_steps(GREEDY, 96, 4))
    return found + [engine.run_together(GREEDY, (prompt,), (PLAIN, A4), "proof 0") for prompt in PROMPTS]


def test_a_second_run_measures_nothing(evidence_store: EvidenceStore) -> None:
    """Everything asked again is reused, equal to what the engine said, and counted."""
    fake = FakeEngine()
    first, second = CachedEngine(fake, evidence_store), CachedEngine(fake, evidence_store)
    measured = measure_all(first)
    calls = dict(fake.calls)
    assert measured == measure_all(FakeEngine())
    assert (first.measured_units, first.reused_units) == (13, 0)
    assert measure_all(second) == measured
    assert fake.calls == calls == {"trace_target": 3, "trace_draft": 6, "time_steps": 1, "run_together": 3}
    assert (second.measured_units, second.reused_units, second.measured_seconds) == (0, 13, 0.0)


def test_an_interrupted_run_resumes(evidence_store: EvidenceStore) -> None:
    """What was measured before an interruption is in the file at once and is not measured again."""
    fake = FakeEngine()
    interrupted = CachedEngine(fake, evidence_store)
    interrupted.trace_target(GREEDY, PROMPTS[0])
    fake.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupted.trace_target(GREEDY, PROMPTS[1])
    assert ask(evidence_store, "SELECT count(*) FROM target_traces") == [(1,)]
    assert ask(evidence_store, "SELECT count(*) FROM infeasible") == [(0,)]
    fake.failure = None
    resumed = CachedEngine(fake, evidence_store)
    measure_all(resumed)
    assert (resumed.measured_units, resumed.reused_units) == (12, 1)


def test_a_failure_is_kept_as_infeasible_and_raised(evidence_store: EvidenceStore) -> None:
    """An engine's failure leaves a row with setup, reason and unit, no number, and may be tried again."""
    fake = FakeEngine()
    remember = CachedEngine(fake, evidence_store)
    trace = remember.trace_target(GREEDY, PROMPTS[0])
    fake.failure = OutOfMemoryError("3 GiB were asked for, 1 GiB is free")
    with pytest.raises(OutOfMemoryError):
        remember.run_together(GREEDY, (PROMPTS[0],), (A4, PLAIN), "race 0")
    with pytest.raises(OutOfMemoryError):  # of two drafts nobody knows which: each is tried alone
        remember.run_together(GREEDY, (PROMPTS[0],), (A4, Setup(draft=NGRAM, length=4), PLAIN), "race 0")
    with pytest.raises(OutOfMemoryError):
        remember.trace_draft(GREEDY, PROMPTS[0], trace, NGRAM, 4)
    fake.failure = EngineError("the device is gone")
    with pytest.raises(EngineError):
        remember.time_steps(GREEDY, 96, 4)
    query = "SELECT digest, reason, detail FROM infeasible JOIN setups ON setups.id = setup_id ORDER BY infeasible.id"
    assert ask(evidence_store, query) == [
        (A4.digest, "OutOfMemoryError", "3 GiB were asked for, 1 GiB is free (in race 0: draft-a k=4, plain, code)"),
        (
            Setup(draft=NGRAM, length=4).digest,
            "OutOfMemoryError",
            "3 GiB were asked for, 1 GiB is free (in acceptance of ngram:max=4,min=2, code)",
        ),
        (PLAIN.digest, "EngineError", "the device is gone (in step times at batch 1, context 96)"),
    ]
    assert ask(evidence_store, "SELECT count(*) FROM samples") == [(0,)]
    fake.failure = None
    assert len(remember.run_together(GREEDY, (PROMPTS[0],), (A4, PLAIN), "race 0")) == 2


def test_a_failure_among_several_drafts_is_put_down_to_none(evidence_store: EvidenceStore) -> None:
    """Callers try each alone, and what fails then is stored; plain decoding is not at fault."""
    fake = FakeEngine()
    fake.failure = EngineError("stopped")
    with pytest.raises(EngineError):
        CachedEngine(fake, evidence_store).run_together(
            GREEDY, (PROMPTS[0],), (PLAIN, A4, Setup(draft=NGRAM, length=2)), "calibration 0"
        )
    assert ask(evidence_store, "SELECT count(*) FROM infeasible") == [(0,)]


def test_a_refusal_is_no_failure(evidence_store: EvidenceStore) -> None:
    """What the caller asked wrongly is raised and leaves no row."""
    fake = FakeEngine()
    fake.failure = InputError("context 512: the target allows 256")
    with pytest.raises(InputError):
        CachedEngine(fake, evidence_store).trace_target(GREEDY, PROMPTS[0])
    assert ask(evidence_store, "SELECT count(*) FROM infeasible") == [(0,)]


class TestDisturbed:
    """Timings that other programs disturbed are measured again by a later run, a few times, and all are kept."""

    @staticmethod
    def ask(evidence_store: EvidenceStore, fake: FakeEngine) -> tuple[Sample, ...]:
        """One pair, as a run of its own asks for it."""
        return CachedEngine(fake, evidence_store).run_together(GREEDY, (PROMPTS[0],), (PLAIN, A4), "proof 0")

    @staticmethod
    def purposes(evidence_store: EvidenceStore) -> list[tuple[str, int]]:
        """Purpose and `disturbed` of every unit of two runs in the file."""
        columns = "purpose, max(CAST(disturbed AS INTEGER)), count(*)"
        tables = "units JOIN samples ON units.id = unit_id"
        rows = ask(evidence_store, f"SELECT {columns} FROM {tables} GROUP BY units.id, purpose ORDER BY units.id")
        assert {size for _, _, size in rows} <= {2}
        return [(purpose, disturbed) for purpose, disturbed, _ in rows]

    def test_a_later_run_repeats_disturbed_runs(self, evidence_store: EvidenceStore) -> None:
        """The first undisturbed repeat answers from then on; the disturbed runs stay in the file."""
        busy, quiet = FakeEngine(), FakeEngine(seed=1)
        busy.disturbed = True
        first = self.ask(evidence_store, busy)
        assert [sample.disturbed for sample in first] == [True, True]
        second = self.ask(evidence_store, quiet)
        assert second != first
        assert [sample.disturbed for sample in second] == [False, False]
        assert self.ask(evidence_store, FakeEngine(seed=2)) == second
        assert self.purposes(evidence_store) == [("proof 0", 1), ("proof 0, again 1", 0)]

    def test_one_disturbed_run_of_a_unit_is_enough(self, evidence_store: EvidenceStore) -> None:
        """A pair of which only plain decoding was disturbed is no pair: both are run again."""
        fake = FakeEngine()
        plain, chosen = fake.run_together(GREEDY, (PROMPTS[0],), (PLAIN, A4), "proof 0")
        scope = Scope(target=fake.target, environment=fake.environment, workload=GREEDY)
        evidence_store.save_samples(
            scope, (PROMPTS[0],), (PLAIN, A4), "proof 0", (replace(plain, disturbed=True), chosen)
        )
        assert self.ask(evidence_store, fake) == (plain, chosen)
        assert self.purposes(evidence_store) == [("proof 0", 1), ("proof 0, again 1", 0)]

    def test_repeats_end(self, evidence_store: EvidenceStore) -> None:
        """On a machine that is never quiet the third repeat answers for good."""
        engines = [FakeEngine(seed=seed) for seed in range(6)]
        for engine in engines:
            engine.disturbed = True
        answers = [self.ask(evidence_store, engine) for engine in engines]
        assert [engine.calls["run_together"] for engine in engines] == [1, 1, 1, 1, 0, 0]
        assert answers[3] == answers[4] == answers[5]
        again = [(f"proof 0, again {number}", 1) for number in (1, 2, 3)]
        assert self.purposes(evidence_store) == [("proof 0", 1), *again]

    def test_a_run_that_asks_twice_gets_one_answer(self, evidence_store: EvidenceStore) -> None:
        """What a run measured itself, it reuses, disturbed or not: runs and step times."""
        fake = FakeEngine()
        fake.disturbed = True
        # the second run repeats the four timed units of the first; what it measured itself is not reused
        for measured, reused in ((13, 0), (4, 9)):
            remember = CachedEngine(fake, evidence_store)
            assert measure_all(remember) == measure_all(remember)
            assert (remember.measured_units, remember.reused_units) == (measured, reused)
        assert fake.calls == {"trace_target": 3, "trace_draft": 6, "time_steps": 2, "run_together": 6}

    def test_a_disturbed_sweep_is_measured_again(self, evidence_store: EvidenceStore) -> None:
        """A later run adds a sweep, until one was not disturbed."""
        fake = FakeEngine()
        for disturbed in (True, True, False, False):
            fake.disturbed = disturbed
            times = CachedEngine(fake, evidence_store).time_steps(GREEDY, 96, 4)
            assert {part.disturbed for part in times.values()} == {disturbed}
        assert fake.calls == {"time_steps": 3}
        assert ask(
            evidence_store,
            "SELECT count(DISTINCT sweep_id), sum(CAST(disturbed AS INTEGER)), count(*) FROM step_times "
            "WHERE width = 1",
        ) == [(3, 6, 9)]


def test_a_faster_process_answers(evidence_store: EvidenceStore, location: Location) -> None:
    """When another process saves a unit while this one measures it, both go on with the same runs."""
    theirs: list[tuple[Sample, ...]] = []

    class Slow(FakeEngine):
        def run_together(self, workload, prompts, setups, purpose):  # type: ignore[no-untyped-def]
            with EvidenceStore.open(location) as other:
                theirs.append(CachedEngine(FakeEngine(seed=1), other).run_together(workload, prompts, setups, purpose))
            return super().run_together(workload, prompts, setups, purpose)

    slow = Slow()
    assert [CachedEngine(slow, evidence_store).run_together(GREEDY, (PROMPTS[0],), (PLAIN, A4), "proof 0")] == theirs
    assert slow.calls == {"run_together": 1}
    assert ask(evidence_store, "SELECT count(*) FROM samples") == [(2,)]


def test_a_faster_process_answers_for_traces(evidence_store: EvidenceStore, location: Location) -> None:
    """Whoever saves a trace or an acceptance first answers for both, though floats differ between machines."""

    class Slow(FakeEngine):
        def trace_target(self, workload, prompt):  # type: ignore[no-untyped-def]
            with EvidenceStore.open(location) as other:
                CachedEngine(FakeEngine(seed=1), other).trace_target(workload, prompt)
            return super().trace_target(workload, prompt)

        def trace_draft(self, workload, prompt, trace, draft, max_length):  # type: ignore[no-untyped-def]
            with EvidenceStore.open(location) as other:
                CachedEngine(FakeEngine(seed=1), other).trace_draft(workload, prompt, trace, draft, max_length)
            return super().trace_draft(workload, prompt, trace, draft, max_length)

    fast, slow = FakeEngine(seed=1), Slow()
    remember = CachedEngine(slow, evidence_store)
    trace = remember.trace_target(GREEDY, PROMPTS[0])
    assert trace == fast.trace_target(GREEDY, PROMPTS[0])
    for draft in slow.drafts:
        found = remember.trace_draft(GREEDY, PROMPTS[0], trace, draft, 4)
        assert found == fast.trace_draft(GREEDY, PROMPTS[0], trace, draft, 4)
    assert slow.calls == {"trace_target": 1, "trace_draft": 2}
    assert ask(evidence_store, "SELECT count(*) FROM acceptance_traces") == [(1,)]


def test_what_others_save_meanwhile_changes_no_answer(evidence_store: EvidenceStore, location: Location) -> None:
    """A run that asks twice gets one answer, though another process added a newer sweep and a quieter repeat."""
    ours, theirs = FakeEngine(), FakeEngine(seed=1)
    ours.disturbed = True
    remember = CachedEngine(ours, evidence_store)
    first = measure_all(remember)
    with EvidenceStore.open(location) as other:
        assert measure_all(CachedEngine(theirs, other)) != first
    assert measure_all(remember) == first
    assert ask(evidence_store, "SELECT count(*) FROM sweeps") == [(2,)]
    assert ask(evidence_store, "SELECT count(*) FROM samples") == [(12,)]


def test_only_the_engine_is_timed(evidence_store: EvidenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured seconds are those of the wrapped engine, failures included: a reused unit adds nothing."""
    ticks = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("store.cached_engine.time.perf_counter", lambda: next(ticks))
    fake = FakeEngine()
    remember = CachedEngine(fake, evidence_store)
    remember.trace_target(GREEDY, PROMPTS[0])
    remember.trace_target(GREEDY, PROMPTS[0])
    assert remember.measured_seconds == 2.5
    fake.failure = EngineError("the device is gone")
    with pytest.raises(EngineError):
        remember.trace_target(GREEDY, PROMPTS[1])
    assert remember.measured_seconds == 3.5


def test_more_drafts_and_lengths_are_measured(evidence_store: EvidenceStore) -> None:
    """A sweep that lacks a draft or a width, and a look-up that is too short, are measured again."""
    fake = FakeEngine()
    remember = CachedEngine(fake, evidence_store)
    trace = remember.trace_target(GREEDY, PROMPTS[0])
    for length in (4, 6, 5):
        remember.time_steps(GREEDY, 96, length)
        remember.trace_draft(GREEDY, PROMPTS[0], trace, NGRAM, length)
        remember.trace_draft(GREEDY, PROMPTS[0], trace, DRAFT_A, length)
    assert fake.calls == {"trace_target": 1, "time_steps": 2, "trace_draft": 3}


def test_what_cannot_be_saved_is_not_passed_on(evidence_store: EvidenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that answers for another prompt is found out before anybody uses the answer."""
    fake = FakeEngine()
    confused = fake.trace_target(GREEDY, PROMPTS[1])
    monkeypatch.setattr(fake, "trace_target", lambda workload, prompt: confused)
    with pytest.raises(StoreError, match="a trace is not of fake-target"):
        CachedEngine(fake, evidence_store).trace_target(GREEDY, PROMPTS[0])


def test_old_timings_are_taken_again_and_traces_are_not(evidence_store: EvidenceStore) -> None:
    """Only what was timed before `since`; the new ones then answer for everybody."""
    first = measure_all(CachedEngine(FakeEngine(), evidence_store))
    later = FakeEngine(seed=0)
    again = CachedEngine(later, evidence_store, since="2999-01-01T00:00:00+00:00")
    measure_all(again)
    assert later.calls == {"time_steps": 1, "run_together": 3}
    ask(
        evidence_store,
        "UPDATE samples SET decode_s = decode_s * 2 WHERE unit_id IN "
        "(SELECT id FROM units WHERE purpose LIKE '%again 1')",
    )
    latest = CachedEngine(FakeEngine(), evidence_store)
    found = measure_all(latest)
    assert latest.measured_units == 0
    assert found != first
    fresh = CachedEngine(FakeEngine(), evidence_store, since="2026-01-01T00:00:00+00:00")
    assert measure_all(fresh) == found
    assert fresh.measured_units == 0
