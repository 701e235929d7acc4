"""The book gives evidence back as it was given, for the same question only, and never overwrites it.

What is in the file is checked with raw SQL, not with the code under test.
"""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from profiles.records.core import PLAIN, Model, Setup
from profiles.records.errors import NewerStoreError, PolicyError, StoreError
from profiles.records.evidence import Infeasible, Sample
from store import tables
from store.database import Location
from store.evidence_store import EvidenceStore, Scope
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, NGRAM, TARGET, FakeEngine, prompts
from tests.support.policies import save_policy
from tests.support.servers import ask, parsed

PROMPT, OTHER = prompts(2)
A4 = Setup(draft=DRAFT_A, length=4)
DRAFTS = (DRAFT_A, NGRAM)
SCOPE = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
ELSEWHERE = replace(SCOPE, environment=replace(MACHINE, device="other cpu", threads=4))
SECOND = Model(name="second", dtype="float32", digest="b" * 32, num_params=10)
UNIT = ((PROMPT,), (PLAIN, A4), "proof 0")
TIMES = {"context_length": 96, "max_length": 4}
COUNT_TRACES = "SELECT count(*) FROM target_traces"


def samples_of(fake: FakeEngine, purpose: str = "proof 0") -> tuple[Sample, ...]:
    return fake.run_together(GREEDY, *UNIT[:2], purpose)


class TestEvidence:
    def test_a_target_trace_comes_back_equal(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A saved target trace is found by prompt and sampling, on any machine, and by nothing else."""
        trace = fake.trace_target(GREEDY, PROMPT)
        evidence_store.save_target_trace(SCOPE, PROMPT, trace)
        hot = replace(SCOPE, workload=replace(GREEDY, temperature=1.0))
        assert evidence_store.find_target_trace(SCOPE, PROMPT) == trace
        assert evidence_store.find_target_trace(ELSEWHERE, PROMPT) == trace
        assert evidence_store.find_target_trace(SCOPE, OTHER) is None
        assert evidence_store.find_target_trace(hot, PROMPT) is None

    def test_float_types_are_kept_apart(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """The same weights in another float type are another target."""
        evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
        half = replace(SCOPE, target=replace(TARGET, dtype="bfloat16"))
        assert evidence_store.find_target_trace(half, PROMPT) is None

    def test_acceptance_comes_back_equal(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Both kinds of acceptance are found by their draft, on any machine."""
        trace = fake.trace_target(GREEDY, PROMPT)
        for draft in DRAFTS:
            acceptance = fake.trace_draft(GREEDY, PROMPT, trace, draft, 4)
            evidence_store.save_acceptance(SCOPE, PROMPT, draft, acceptance)
            assert evidence_store.find_acceptance(ELSEWHERE, PROMPT, draft, 4) == acceptance
            assert evidence_store.find_acceptance(SCOPE, OTHER, draft, 4) is None

    def test_a_longer_look_up_answers_for_shorter_ones(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A look-up trace up to k=4 answers for k=2, not for k=5; a longer one is added beside it."""
        trace = fake.trace_target(GREEDY, PROMPT)
        four, eight = (fake.trace_draft(GREEDY, PROMPT, trace, NGRAM, length) for length in (4, 8))
        evidence_store.save_acceptance(SCOPE, PROMPT, NGRAM, four)
        assert evidence_store.find_acceptance(SCOPE, PROMPT, NGRAM, 2) == four
        assert evidence_store.find_acceptance(SCOPE, PROMPT, NGRAM, 5) is None
        evidence_store.save_acceptance(SCOPE, PROMPT, NGRAM, eight)
        assert evidence_store.find_acceptance(SCOPE, PROMPT, NGRAM, 2) == eight
        assert ask(evidence_store, "SELECT max_length FROM lookup_traces ORDER BY id") == [(4,), (8,)]

    def test_step_times_come_back_equal(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A sweep is found for its machine, anchor and every length it covers."""
        times = fake.time_steps(GREEDY, 96, 4)
        evidence_store.save_step_times(SCOPE, DRAFTS, 4, times)
        assert evidence_store.find_step_times(SCOPE, DRAFTS, **TIMES) == times
        assert evidence_store.find_step_times(SCOPE, (DRAFT_A,), context_length=96, max_length=2) == times
        assert evidence_store.find_step_times(SCOPE, DRAFTS, context_length=96, max_length=5) is None
        assert evidence_store.find_step_times(SCOPE, DRAFTS, context_length=128, max_length=4) is None
        assert evidence_store.find_step_times(ELSEWHERE, DRAFTS, **TIMES) is None
        two_rows = replace(SCOPE, workload=replace(GREEDY, batch_size=2))
        assert evidence_store.find_step_times(two_rows, DRAFTS, **TIMES) is None

    def test_sampled_step_times_are_told_apart(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Choosing a token costs time by its settings; a greedy sweep never answers for them, nor the other way."""
        scopes = [
            replace(SCOPE, workload=replace(GREEDY, temperature=temperature, top_p=top_p))
            for temperature, top_p in ((0.0, 1.0), (0.8, 1.0), (0.8, 0.9))
        ]
        for seed, scope in enumerate(scopes):
            assert evidence_store.find_step_times(scope, DRAFTS, **TIMES) is None
            evidence_store.save_step_times(scope, DRAFTS, 4, FakeEngine(seed=seed).time_steps(GREEDY, 96, 4))
        found = [evidence_store.find_step_times(scope, DRAFTS, **TIMES) for scope in scopes]
        assert found == [FakeEngine(seed=seed).time_steps(GREEDY, 96, 4) for seed in range(3)]
        assert set(ask(evidence_store, "SELECT DISTINCT sampling FROM step_ms")) == {
            (None,),
            ("temperature 0.8, top-p 0.9, top-k 0",),
            ("temperature 0.8, top-p 1, top-k 0",),
        }

    def test_the_newest_complete_sweep_answers(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A newer sweep wins as a whole; parts of two sweeps are never mixed."""
        old, new = fake.time_steps(GREEDY, 96, 4), FakeEngine(seed=1).time_steps(GREEDY, 96, 4)
        evidence_store.save_step_times(SCOPE, DRAFTS, 4, old)
        evidence_store.save_step_times(SCOPE, (DRAFT_A,), 4, {part: new[part] for part in new if part != NGRAM.digest})
        assert evidence_store.find_step_times(SCOPE, DRAFTS, **TIMES) == old
        evidence_store.save_step_times(SCOPE, DRAFTS, 4, new)
        assert evidence_store.find_step_times(SCOPE, DRAFTS, **TIMES) == new
        query = "SELECT count(DISTINCT sweep_id), count(*) FROM step_times WHERE width = 1"
        assert ask(evidence_store, query) == [(3, 8)]

    def test_an_undisturbed_sweep_goes_before_newer_ones(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Of disturbed sweeps the newest answers, until there is one that nothing disturbed."""
        quiet, *disturbed = (FakeEngine(seed=seed).time_steps(GREEDY, 96, 4) for seed in range(4))
        disturbed = [
            {part: replace(times, disturbed=part == NGRAM.digest) for part, times in sweep.items()}
            for sweep in disturbed
        ]
        for sweep in disturbed[:2]:
            evidence_store.save_step_times(SCOPE, DRAFTS, 4, sweep)
            assert evidence_store.find_step_times(SCOPE, DRAFTS, **TIMES) == sweep
        for sweep in (quiet, disturbed[2]):
            evidence_store.save_step_times(SCOPE, DRAFTS, 4, sweep)
            assert evidence_store.find_step_times(SCOPE, DRAFTS, **TIMES) == quiet
        query = "SELECT sum(CAST(disturbed AS INTEGER)), count(*) FROM step_times WHERE width = 1"
        assert ask(evidence_store, query) == [(3, 12)]

    def test_an_incomplete_sweep_is_refused(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A sweep without a draft or a target width would never answer, so it is not saved."""
        times = fake.time_steps(GREEDY, 96, 4)
        without_draft = {part: staircase for part, staircase in times.items() if part != NGRAM.digest}
        for bad, length in ((without_draft, 4), (times, 5)):
            with pytest.raises(StoreError, match="lack a draft or a target width of 1 to"):
                evidence_store.save_step_times(SCOPE, DRAFTS, length, bad)
        assert ask(evidence_store, "SELECT count(*) FROM step_times") == [(0,)]

    def test_samples_come_back_equal(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A unit of runs is found in its order, for its occasion and machine only."""
        samples = samples_of(fake)
        assert evidence_store.save_samples(SCOPE, *UNIT, samples) == samples
        assert evidence_store.find_samples(SCOPE, *UNIT) == samples
        assert evidence_store.find_samples(SCOPE, (PROMPT,), (A4, PLAIN), "proof 0") is None
        assert evidence_store.find_samples(SCOPE, (PROMPT,), (PLAIN, A4), "race 0") is None
        assert evidence_store.find_samples(ELSEWHERE, *UNIT) is None
        query = """SELECT position, name, purpose, count(*) OVER (PARTITION BY unit_id) FROM samples
            JOIN units ON units.id = unit_id JOIN setups ON setups.id = setup_id ORDER BY position"""
        assert ask(evidence_store, query) == [(0, "plain", "proof 0", 2), (1, "draft-a k=4", "proof 0", 2)]

    def test_failures_are_kept(self, evidence_store: EvidenceStore) -> None:
        """A failure is kept with its whole setup, as often as it happens."""
        found = Infeasible(setup=A4, reason="OutOfMemoryError", detail="3 GiB were asked for")
        evidence_store.save_infeasible(SCOPE, found)
        evidence_store.save_infeasible(SCOPE, found)
        query = "SELECT setup, digest, reason, detail FROM infeasible JOIN setups ON setups.id = setup_id"
        rows = ask(evidence_store, query)
        assert {parsed(setup)["length"] for setup, *_ in rows} == {4}
        assert [row[1:] for row in rows] == [(A4.digest, "OutOfMemoryError", "3 GiB were asked for")] * 2

    def test_every_row_says_when_and_where_in_utc(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Evidence is stored with its time in UTC and its machine, even where the machine is no part of the key."""
        evidence_store.save_target_trace(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
        query = "SELECT measured_at, device FROM target_traces JOIN environments ON digest = environment_digest"
        [(measured_at, device)] = ask(evidence_store, query)
        assert device == "fake cpu"
        assert measured_at[:10] == time.strftime("%Y-%m-%d", time.gmtime())
        assert measured_at.endswith("+00:00")


class TestNothingIsOverwritten:
    def test_saving_again_changes_nothing(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Equal evidence is saved once."""
        trace = fake.trace_target(GREEDY, PROMPT)
        for _ in range(2):
            evidence_store.save_target_trace(SCOPE, PROMPT, trace)
            evidence_store.save_samples(SCOPE, *UNIT, samples_of(fake))
        assert ask(evidence_store, COUNT_TRACES) == [(1,)]
        assert ask(evidence_store, "SELECT count(*) FROM samples") == [(2,)]

    def test_a_moved_draft_is_no_conflict(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Names are labels: the same weights under another name are the same evidence."""
        moved = replace(DRAFT_A, model=replace(DRAFT_A.model, name="elsewhere/draft-a"))  # type: ignore[type-var]
        acceptance = fake.trace_draft(GREEDY, PROMPT, fake.trace_target(GREEDY, PROMPT), DRAFT_A, 4)
        evidence_store.save_acceptance(SCOPE, PROMPT, DRAFT_A, acceptance)
        evidence_store.save_acceptance(SCOPE, PROMPT, moved, acceptance)
        assert ask(evidence_store, "SELECT draft_name FROM acceptance_traces") == [("draft-a",)]

    def test_traces_that_were_measured_twice(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """The later of two unlike traces gives way to the first."""
        theirs, ours = fake.trace_target(GREEDY, PROMPT), FakeEngine(seed=1).trace_target(GREEDY, PROMPT)
        for trace in (theirs, ours):
            assert evidence_store.save_target_trace(SCOPE, PROMPT, trace) == theirs
        assert evidence_store.find_target_trace(SCOPE, PROMPT) == theirs
        for draft in DRAFTS:
            first, second = (FakeEngine(seed=seed).trace_draft(GREEDY, PROMPT, theirs, draft, 4) for seed in (0, 1))
            assert first != second
            for acceptance in (first, second):
                assert evidence_store.save_acceptance(SCOPE, PROMPT, draft, acceptance) == first

    def test_the_first_runs_of_a_unit_answer(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """Two processes never time alike: the later one is given what the first has saved."""
        first = samples_of(fake)
        evidence_store.save_samples(SCOPE, *UNIT, first)
        assert evidence_store.save_samples(SCOPE, *UNIT, samples_of(FakeEngine(seed=1))) == first
        assert evidence_store.find_samples(SCOPE, *UNIT) == first
        assert ask(evidence_store, "SELECT count(*) FROM samples") == [(2,)]

    def test_evidence_of_another_key_is_refused(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A record is only saved under the prompt, draft and setups it is about."""
        with pytest.raises(StoreError, match=r"a trace is not of fake-target, .*prompt_digest"):
            evidence_store.save_target_trace(SCOPE, OTHER, fake.trace_target(GREEDY, PROMPT))
        with pytest.raises(StoreError, match="not of the setups and prompts that were run"):
            evidence_store.save_samples(SCOPE, (PROMPT,), (A4, PLAIN), "proof 0", samples_of(fake))
        assert ask(evidence_store, "SELECT count(*) FROM models") == [(0,)]

    def test_leaving_without_commit_rolls_back(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A unit of which one row cannot be written leaves no row at all."""
        good, chosen = samples_of(fake)
        bad = FakeEngine().run_together(GREEDY, (PROMPT,), (A4,), "proof 0")[0]
        object.__setattr__(bad, "output_tokens", None)  # breaks NOT NULL in the second row
        assert chosen != bad
        with pytest.raises(StoreError, match=r"output_tokens.*not-null|NOT NULL.*output_tokens"):
            evidence_store.save_samples(SCOPE, *UNIT, (good, bad))
        assert ask(evidence_store, "SELECT count(*) FROM samples") == [(0,)]
        assert ask(evidence_store, "SELECT count(*) FROM models") == [(0,)]

    def test_numbers_that_are_not_finite_are_refused(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """JSON has no NaN: such evidence is an error, not a row nobody else can read."""
        acceptance = fake.trace_draft(GREEDY, PROMPT, fake.trace_target(GREEDY, PROMPT), DRAFT_A, 4)
        object.__setattr__(acceptance, "confidences", (float("nan"),) * 64)
        with pytest.raises(StoreError, match=r"a row cannot be read or written: .*not finite cannot be stored"):
            evidence_store.save_acceptance(SCOPE, PROMPT, DRAFT_A, acceptance)


class TestRunsAndPolicies:
    def test_a_run_is_noted_at_both_ends(self, evidence_store: EvidenceStore) -> None:
        """A run has no end until it is finished, and can be finished once."""
        run_id = evidence_store.save_run(SCOPE)
        assert ask(evidence_store, "SELECT finished_at, outcome FROM runs") == [(None, None)]
        evidence_store.finish_run(run_id, {"proven": True})
        [(workload, finished_at, outcome)] = ask(evidence_store, "SELECT workload, finished_at, outcome FROM runs")
        assert (parsed(workload)["max_new_tokens"], parsed(outcome)) == (64, {"proven": True})
        assert finished_at is not None
        evidence_store.save_run(SCOPE)
        assert evidence_store.latest_outcome(TARGET, MACHINE) == {"proven": True}
        assert evidence_store.latest_outcome(SECOND, MACHINE) == {}
        for wrong in (run_id, run_id + 2):
            with pytest.raises(StoreError, match=f"run {wrong} is not under way"):
                evidence_store.finish_run(wrong, {})

    def test_the_latest_policy_answers(self, evidence_store: EvidenceStore) -> None:
        """The policy saved last is given, of all targets or of one, on any machine or on one."""
        assert evidence_store.latest_policy() is None
        for text, target in (("one", TARGET), ("two", TARGET), ("three", SECOND)):
            save_policy(evidence_store, text, target, MACHINE)
        assert evidence_store.latest_policy() == "three"
        assert evidence_store.latest_policy(TARGET.digest) == evidence_store.latest_policy("fake-target") == "two"
        assert evidence_store.latest_policy("c" * 32) is None
        save_policy(evidence_store, "four", TARGET, ELSEWHERE.environment)
        for where in ({"target": TARGET.run_digest}, {"environment": ELSEWHERE.environment}):
            assert evidence_store.latest_policy(**where) == "four"  # type: ignore[arg-type]
        assert evidence_store.latest_policy(TARGET.run_digest, MACHINE) == "two"
        assert evidence_store.latest_policy(SECOND.run_digest, ELSEWHERE.environment) is None

    def test_the_newest_policy_answers_whatever_the_clock_said(self, evidence_store: EvidenceStore) -> None:
        """A clock that was ahead once hides no later policy, and a later one is made from it."""
        save_policy(evidence_store, "first", TARGET, MACHINE)
        ask(evidence_store, "UPDATE policies SET created_at = '2031-01-01T00:00:00+00:00'")
        evidence_store.replace_policy(TARGET, MACHINE, lambda latest: f"after {latest}")
        assert evidence_store.latest_policy() == evidence_store.latest_policy(TARGET.name, MACHINE) == "after first"
        rows = ask(evidence_store, "SELECT generation, policy FROM policies ORDER BY id")
        assert rows == [(1, "first"), (2, "after first")]

    def test_an_older_policy_that_came_later_does_not_answer(self, evidence_store: EvidenceStore) -> None:
        """A bundle brings policies with their generation; of equal generations the one saved last answers."""
        for text in ("one", "two", "from a bundle"):
            save_policy(evidence_store, text, TARGET, MACHINE)
        ask(evidence_store, "UPDATE policies SET generation = 1 WHERE policy = 'from a bundle'")
        assert evidence_store.latest_policy() == evidence_store.latest_policy(TARGET.name, MACHINE) == "two"
        ask(evidence_store, "UPDATE policies SET generation = 1")
        assert evidence_store.latest_policy() == "from a bundle"

    def test_of_two_that_replace_a_policy_the_later_joins_the_earlier(
        self, evidence_store: EvidenceStore, location: Location
    ) -> None:
        """Nobody saves a policy between the reading of the latest one and the saving of what was made from it."""
        second = threading.Thread(target=self._add, args=(location, "B"))

        def first(latest: str | None) -> str:
            second.start()
            second.join(timeout=0.3)
            assert second.is_alive()
            return f"{latest or ''}A"

        evidence_store.replace_policy(TARGET, MACHINE, first)
        second.join()
        assert evidence_store.latest_policy() == "AB"

    def test_a_policy_that_cannot_be_made_changes_nothing(self, evidence_store: EvidenceStore) -> None:
        """What goes wrong with its file is told as it is."""

        def fail(latest: str | None) -> str:
            raise PolicyError("policy file cannot be written")

        with pytest.raises(PolicyError, match=r"^policy file cannot be written$"):
            evidence_store.replace_policy(TARGET, MACHINE, fail)
        assert evidence_store.latest_policy() is None

    @staticmethod
    def _add(location: Location, letter: str) -> None:
        with EvidenceStore.open(location) as evidence_store:
            evidence_store.replace_policy(TARGET, MACHINE, lambda latest: f"{latest}{letter}")


class TestSchemas:
    def test_revisions_and_tables_agree(self, evidence_store: EvidenceStore) -> None:
        """The schema that the revisions make is the one the code is written against."""
        with evidence_store.reading() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []

    def test_another_programs_database_is_refused(self, location: Location) -> None:
        """A database that is not ours gets no tables of ours."""
        if isinstance(location, Path):
            location.parent.mkdir()
        ask(location, "CREATE TABLE songs (name TEXT)")
        with pytest.raises(StoreError, match="the table 'songs' of another program"):
            EvidenceStore.open(location)
        ask(location, "DROP TABLE songs")
        EvidenceStore.open(location).close()  # it is empty again


class TestReadOnly:
    def test_it_answers_as_the_open_book_does(
        self, evidence_store: EvidenceStore, location: Location, fake: FakeEngine
    ) -> None:
        """Every question that a look-up asks has the same answer, also while the writer has the store open."""
        trace = fake.trace_target(GREEDY, PROMPT)
        evidence_store.save_target_trace(SCOPE, PROMPT, trace)
        evidence_store.save_samples(SCOPE, *UNIT, samples_of(fake))
        save_policy(evidence_store, "one", TARGET, MACHINE)
        evidence_store.finish_run(evidence_store.save_run(SCOPE), {"proven": True})
        with EvidenceStore.open_read_only(location) as reader:
            assert reader.name == evidence_store.name
            assert reader.find_target_trace(SCOPE, PROMPT) == trace
            assert reader.find_samples(SCOPE, *UNIT) == samples_of(fake)
            assert reader.latest_policy() == "one"
            assert reader.latest_outcome(TARGET, MACHINE) == {"proven": True}
            save_policy(evidence_store, "two", TARGET, MACHINE)
            assert reader.latest_policy() == "two"

    def test_it_cannot_write(self, evidence_store: EvidenceStore, location: Location) -> None:
        """Saving is refused in one line, and nothing is saved."""
        with (
            EvidenceStore.open_read_only(location) as reader,
            pytest.raises(StoreError, match=r"read-?only.*allow writing"),
        ):
            save_policy(reader, "one", TARGET, MACHINE)
        assert evidence_store.latest_policy() is None

    def test_an_empty_store_is_not_made_into_one(self, location: Location) -> None:
        """A store that is not there, or has no tables, is refused and stays as it was."""
        with pytest.raises(StoreError, match=r"it is not there: run|no tables yet, this draftpick reads \d{4}"):
            EvidenceStore.open_read_only(location)
        assert not isinstance(location, Path) or not location.parent.exists()
        with pytest.raises(StoreError, match=r"it is not there: run|no tables yet"):
            EvidenceStore.open_read_only(location)

    @pytest.mark.parametrize(("version", "error"), [("0002", StoreError), ("9998", NewerStoreError)])
    def test_another_schema_is_told(
        self, evidence_store: EvidenceStore, location: Location, version: str, error: type[StoreError]
    ) -> None:
        """An older one says how it is upgraded, a newer one that draftpick must be; neither is touched."""
        ask(evidence_store, f"UPDATE alembic_version SET version_num = '{version}'")
        reasons = {"0002": "the older schema 0002, .* reads 0006: `tune.py show`", "9998": "schema 9998, .* up to 0006"}
        with pytest.raises(error, match=reasons[version]):
            EvidenceStore.open_read_only(location)
        if version == "9998":
            with pytest.raises(error, match=reasons[version]):
                EvidenceStore.open(location)
        assert ask(location, "SELECT version_num FROM alembic_version") == [(version,)]


class TestTheTimeouts:
    def test_a_writer_waits_for_another(self, evidence_store: EvidenceStore, fake: FakeEngine) -> None:
        """A unit that is saved while another process writes is saved when that one is done."""
        with evidence_store.writing():
            waiting = threading.Thread(
                target=evidence_store.save_target_trace, args=(SCOPE, PROMPT, fake.trace_target(GREEDY, PROMPT))
            )
            waiting.start()
            waiting.join(timeout=0.3)
            assert waiting.is_alive()
        waiting.join()
        assert ask(evidence_store, COUNT_TRACES) == [(1,)]

    def test_a_writer_that_waited_too_long_says_so(
        self, evidence_store: EvidenceStore, location: Location, fake: FakeEngine
    ) -> None:
        """After its timeout, in one line; the unit can be saved later."""
        trace = fake.trace_target(GREEDY, PROMPT)
        with EvidenceStore.open(location, busy_timeout_s=0.1) as other:
            with (
                evidence_store.writing(),
                pytest.raises(StoreError, match=r"lock.*: another process keeps it locked") as caught,
            ):
                other.save_target_trace(SCOPE, PROMPT, trace)
            other.save_target_trace(SCOPE, PROMPT, trace)
        assert "\n" not in str(caught.value)
        assert ask(evidence_store, COUNT_TRACES) == [(1,)]

    def test_readers_do_not_wait(self, evidence_store: EvidenceStore, location: Location) -> None:
        """Who reads while another writes sees the last committed state at once."""
        save_policy(evidence_store, "one", TARGET, MACHINE)
        with evidence_store.writing(), EvidenceStore.open_read_only(location, busy_timeout_s=0.1) as reader:
            assert reader.latest_policy() == "one"

    def test_a_reader_sees_one_state(self, evidence_store: EvidenceStore, location: Location) -> None:
        """What another process commits in the middle of a reading is not seen in it."""
        query = sqlalchemy.select(sqlalchemy.func.count()).select_from(tables.policies)
        with EvidenceStore.open(location) as other, evidence_store.reading() as connection:
            assert connection.scalar(query) == 0
            save_policy(other, "one", TARGET, MACHINE)
            assert connection.scalar(query) == 0
