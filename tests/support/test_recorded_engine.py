"""The recorded engine answers exactly what was recorded, survives a file, and refuses what was never measured."""

from pathlib import Path

import pytest

from profiles.acceptance import expected_rounds
from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Setup, Workload
from profiles.records.errors import NotMeasuredError
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine, prompts
from tests.support.recorded_engine import RecordedEngine, Recorder

PROMPT, OTHER = prompts(2)
A4 = Setup(draft=DRAFT_A, length=4)


def ask_everything(engine: Engine) -> list[object]:
    trace = engine.trace_target(GREEDY, PROMPT)
    return [
        trace,
        engine.trace_draft(GREEDY, PROMPT, trace, DRAFT_A, 4),
        engine.trace_draft(GREEDY, PROMPT, trace, NGRAM, 4),
        engine.time_steps(GREEDY, 96, 4),
        engine.run_together(GREEDY, (PROMPT,), (PLAIN, A4), "proof 0"),
    ]


@pytest.fixture
def recording() -> RecordedEngine:
    recorder = Recorder(FakeEngine())
    ask_everything(recorder)
    return recorder.recording


def test_recording_answers_as_the_engine_did(recording: RecordedEngine) -> None:
    """A recording gives the records of the engine it was made from, target and drafts included."""
    fake = FakeEngine()
    assert ask_everything(recording) == ask_everything(fake)
    assert (recording.target, recording.drafts, recording.environment) == (fake.target, fake.drafts, fake.environment)


def test_recording_survives_a_file(recording: RecordedEngine, tmp_path: Path) -> None:
    """Loading what was saved gives an equal recording, and timings are still said to be disturbed where they were."""
    recording.save(tmp_path / "recording.json")
    assert RecordedEngine.load(tmp_path / "recording.json") == recording
    fake = FakeEngine()
    fake.disturbed = True
    busy = Recorder(fake)
    ask_everything(busy)
    busy.recording.save(tmp_path / "busy.json")
    loaded = RecordedEngine.load(tmp_path / "busy.json")
    assert loaded == busy.recording
    assert all(part.disturbed for part in loaded.time_steps(GREEDY, 96, 4).values())


def test_unmeasured_points_are_named(recording: RecordedEngine) -> None:
    """Prompt, draft, length, anchor, occasion and order of setups: each unmeasured one raises and is named."""
    trace = recording.trace_target(GREEDY, PROMPT)
    early_exit = type(DRAFT_A)(kind="early_exit", num_layers=2)
    hot = Workload(context_length=256, max_new_tokens=64, temperature=1.0)
    with pytest.raises(NotMeasuredError, match=f"target's trace of prompt {OTHER.digest[:8]}"):
        recording.trace_target(GREEDY, OTHER)
    with pytest.raises(NotMeasuredError, match="target's trace"):
        recording.trace_target(hot, PROMPT)
    with pytest.raises(NotMeasuredError, match="acceptance of early-exit:2 on"):
        recording.trace_draft(GREEDY, PROMPT, trace, early_exit, 4)
    with pytest.raises(NotMeasuredError, match="measured up to k=4, not k=5"):
        recording.trace_draft(GREEDY, PROMPT, trace, NGRAM, 5)
    with pytest.raises(NotMeasuredError, match="batch 1, context 128 were never"):
        recording.time_steps(GREEDY, 128, 4)
    with pytest.raises(NotMeasuredError, match="up to k=4, not every part up to k=5"):
        recording.time_steps(GREEDY, 96, 5)
    with pytest.raises(NotMeasuredError, match="'race 0'"):
        recording.run_together(GREEDY, (PROMPT,), (PLAIN, A4), "race 0")
    with pytest.raises(NotMeasuredError, match="draft-a k=4, plain"):
        recording.run_together(GREEDY, (PROMPT,), (A4, PLAIN), "proof 0")


def test_acceptance_over_another_trace_is_refused(recording: RecordedEngine) -> None:
    """Acceptance belongs to one target trace and never answers for another."""
    another = FakeEngine(seed=1).trace_target(GREEDY, PROMPT)
    with pytest.raises(NotMeasuredError, match="over another target trace"):
        recording.trace_draft(GREEDY, PROMPT, another, DRAFT_A, 4)


def test_shorter_lengths_are_answered_by_longer_ones(recording: RecordedEngine) -> None:
    """What was measured up to k=4 answers for k=2."""
    trace = recording.trace_target(GREEDY, PROMPT)
    assert recording.trace_draft(GREEDY, PROMPT, trace, NGRAM, 2) == recording.trace_draft(
        GREEDY, PROMPT, trace, NGRAM, 4
    )
    assert recording.time_steps(GREEDY, 96, 2) == recording.time_steps(GREEDY, 96, 4)


def test_fake_runs_follow_the_walk_and_the_clock() -> None:
    """The fake engine is what the other tests think it is: plain 5 ms per token, rounds as walked, draft-a faster."""
    fake = FakeEngine()
    trace = fake.trace_target(GREEDY, PROMPT)
    plain, chosen = fake.run_together(GREEDY, (PROMPT,), (PLAIN, A4), "proof 0")
    walked = expected_rounds.expected_rounds(trace, fake.trace_draft(GREEDY, PROMPT, trace, DRAFT_A, 4), 4, 64)
    assert dict(chosen.rounds) == dict(walked.rounds)
    assert plain.rounds == {(0, 0): 63}
    assert plain.decode_s / 63 == pytest.approx(0.005, rel=0.06)
    assert sum(count * (accepted + 1) for (_, accepted), count in chosen.rounds.items()) == 63
    assert 1.1 < plain.decode_s / chosen.decode_s < 3.0
