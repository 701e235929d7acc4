"""What every engine must keep: one suite over the torch engine, the recorded one and the remembering wrapper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles import models
from profiles.drafting import DraftSource
from profiles.engine import TorchEngine
from profiles.errors import InputError, NotMeasuredError
from profiles.formulas import walk
from profiles.protocol import Engine
from profiles.recorded import RecordedEngine, Recorder
from profiles.terms import CATCH_UP_WIDTHS, PLAIN, AcceptanceTrace, Draft, LookupTrace, Prompt, Setup, Workload
from store.book import Book
from store.remember import Remember

WORKLOAD = Workload(context_length=96, max_new_tokens=24)
PROMPT = Prompt(domain="a", token_ids=tuple(range(20, 40)))
NGRAM = Draft(kind="ngram", max_match=3, min_match=1)
MAX_LENGTH = 4


def _setups(engine: Engine) -> tuple[Setup, ...]:
    return (PLAIN, *(Setup(draft=draft, length=3) for draft in engine.drafts), PLAIN)


def _ask_everything(engine: Engine) -> None:
    trace = engine.trace_target(WORKLOAD, PROMPT)
    for draft in engine.drafts:
        engine.trace_draft(WORKLOAD, PROMPT, trace, draft, MAX_LENGTH)
    engine.time_steps(WORKLOAD, 32, MAX_LENGTH)
    engine.run_together(WORKLOAD, (PROMPT,), _setups(engine), "test 0")


@pytest.fixture(scope="module")
def torch_engine(tiny_folders: dict[str, Path]) -> TorchEngine:
    target = models.load(str(tiny_folders["llama"]), dtype="float32", device="cpu")
    other = models.load(str(tiny_folders["qwen2"]), dtype="float32", device="cpu")
    sources = (
        DraftSource(draft=Draft(kind="model", model=other.record), model=other.model),
        DraftSource(draft=Draft(kind="early_exit", num_layers=1), model=models.early_exit(target, 1)),
        DraftSource(draft=NGRAM, model=None),
    )
    return TorchEngine(target, sources, "cpu")


@pytest.fixture(scope="module")
def recording(torch_engine: TorchEngine) -> RecordedEngine:
    recorder = Recorder(torch_engine)
    _ask_everything(recorder)
    return recorder.recording


@pytest.fixture(params=["torch", "recorded", "remembered"])
def engine(
    request: pytest.FixtureRequest, torch_engine: TorchEngine, recording: RecordedEngine, tmp_path: Path
) -> Iterator[Engine]:
    """Each engine in turn; the wrapper wraps the recording, and answers the second question from its book."""
    if request.param == "remembered":
        with Book.open(tmp_path / "evidence.db") as book:
            remembering = Remember(recording, book)
            _ask_everything(remembering)
            yield remembering
    else:
        yield torch_engine if request.param == "torch" else recording


class TestEngineContract:
    """Every promise of `terms.Engine`."""

    def test_trace_of_the_target(self, engine: Engine) -> None:
        """One probability and one gap per emitted token; the prompt is named by its digest."""
        trace = engine.trace_target(WORKLOAD, PROMPT)
        assert trace.prompt_digest == PROMPT.digest
        assert len(trace.token_ids) == 24
        assert all(0.0 < prob <= 1.0 for prob in trace.target_probs)
        assert all(gap >= 0.0 for gap in trace.logit_gaps)
        assert trace == engine.trace_target(WORKLOAD, PROMPT)

    def test_acceptance_of_every_draft(self, engine: Engine) -> None:
        """One entry per emitted token, of the form that fits the kind of draft."""
        trace = engine.trace_target(WORKLOAD, PROMPT)
        for draft in engine.drafts:
            acceptance = engine.trace_draft(WORKLOAD, PROMPT, trace, draft, MAX_LENGTH)
            assert acceptance.draft_digest == draft.digest
            if draft.kind == "ngram":
                assert isinstance(acceptance, LookupTrace)
                assert len(acceptance.proposed) == 24
            else:
                assert isinstance(acceptance, AcceptanceTrace)
                assert set(acceptance.keep_probs) <= {0.0, 1.0}

    def test_step_times_cover_what_rounds_use(self, engine: Engine) -> None:
        """The target at widths 1..k+1, a draft model at 1, 2 and maybe more, a look-up at every length."""
        times = engine.time_steps(WORKLOAD, 32, MAX_LENGTH)
        assert set(times[engine.target.run_digest].samples_s) == {1, 2, 3, 4, 5}
        for draft in engine.drafts:
            widths = {1, 2, 3, 4} if draft.kind == "ngram" else {1, 2}
            more = set() if draft.kind == "ngram" else set(CATCH_UP_WIDTHS)
            assert widths <= set(times[draft.digest].samples_s) <= widths | more
            assert times[draft.digest].context_length == 32

    def test_real_runs_in_the_order_asked(self, engine: Engine) -> None:
        """One sample per setup, equal greedy outputs, and rounds as the walk has them."""
        setups = _setups(engine)
        samples = engine.run_together(WORKLOAD, (PROMPT,), setups, "test 0")
        assert [sample.setup_digest for sample in samples] == [setup.digest for setup in setups]
        assert len({sample.output_digest for sample in samples}) == 1
        trace = engine.trace_target(WORKLOAD, PROMPT)
        for setup, sample in zip(setups, samples, strict=True):
            acceptance = None
            if setup.draft is not None:
                acceptance = engine.trace_draft(WORKLOAD, PROMPT, trace, setup.draft, MAX_LENGTH)
            assert dict(sample.rounds) == dict(walk(trace, acceptance, setup.length, 24).rounds)

    def test_what_it_does_not_have_is_an_error(self, engine: Engine) -> None:
        """A draft never loaded or measured is refused with a message that names it."""
        unknown = Setup(draft=Draft(kind="ngram", max_match=7, min_match=7), length=2)
        with pytest.raises((InputError, NotMeasuredError)):
            engine.run_together(WORKLOAD, (PROMPT,), (unknown,), "test 0")
