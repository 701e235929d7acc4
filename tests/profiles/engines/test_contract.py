"""What every engine must keep: one suite over torch, torch behind a store, llama.cpp and vLLM."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.builtin import TARGET
from profiles.engines import factory
from profiles.engines.base import Engine, Times
from profiles.engines.factory import EngineSpec, ModelSpec
from profiles.engines.openai.launch import SERVER_KINDS
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.models.early_exit import early_exit
from profiles.records.core import CATCH_UP_WIDTHS, DRAFT_KINDS, PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.draft_spec import parse_draft
from profiles.records.errors import InputError
from profiles.records.evidence import LookupTrace, sparse_lengths
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore
from tests.lanes.places import RUNNING

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
    target = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu")
    other = loader.load(str(tiny_folders["qwen2"]), dtype="float32", device="cpu")
    drafts = {
        Draft(kind="model", model=other.record): other.model,
        Draft(kind="early_exit", num_layers=1): early_exit(target, 1),
        NGRAM: None,
    }
    return TorchEngine(target, drafts, "cpu")


@pytest.fixture(scope="module")
def cached_engine(torch_engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Answers the second question from its store."""
    with EvidenceStore.open(tmp_path_factory.mktemp("store") / "evidence.db") as evidence_store:
        cached = CachedEngine(torch_engine, evidence_store)
        _ask_everything(cached)
        yield cached


def _served(engine: str) -> Iterator[Engine]:
    """The pair that ships on a serving engine, with a look-up that it has."""
    drafts = (parse_draft("builtin:draft-general"), parse_draft(SERVER_KINDS[engine].look_up))
    models = ModelSpec(target=TARGET, drafts=drafts, dtype="float32")
    python = str(RUNNING.python) if engine == "vllm" else None
    spec = EngineSpec(engine=engine, command=python, threads=1, device="cpu", max_length=MAX_LENGTH)
    bench = factory.open_bench(spec, models)
    yield bench.engine
    bench.close()


@pytest.fixture(scope="module")
def llamacpp_engine() -> Iterator[Engine]:
    pytest.importorskip("xllamacpp")
    yield from _served("llamacpp")


@pytest.fixture(scope="module")
def vllm_engine() -> Iterator[Engine]:
    if not RUNNING.is_whole:
        pytest.skip("no lane: make test-vllm")
    yield from _served("vllm")


@pytest.fixture(params=["torch", "cached", "llamacpp", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    engine: Engine = request.getfixturevalue(f"{request.param}_engine")
    return engine


class TestEngineContract:
    """Every promise of `protocol.Engine`."""

    def test_its_properties_are_stated(self, engine: Engine) -> None:
        """Values of the kinds there are, drafts of a kind it has, and a name for traces of another arithmetic."""
        stated = engine.capabilities
        assert stated.times in get_args(Times)
        assert set(stated.traced_kinds) <= set(DRAFT_KINDS)
        assert (stated.origin == "") == (stated.name == "torch")
        assert stated.name in engine.environment.engine
        assert stated.objection(WORKLOAD, drafting=True) is None

    def test_trace_of_the_target(self, engine: Engine) -> None:
        """One probability and one gap per emitted token; the prompt is named by its digest."""
        trace = engine.trace_target(WORKLOAD, PROMPT)
        assert trace.prompt_digest == PROMPT.digest
        assert len(trace.token_ids) == 24
        assert all(0.0 < prob <= 1.0 for prob in trace.target_probs)
        assert all(gap >= 0.0 for gap in trace.logit_gaps)
        assert trace == engine.trace_target(WORKLOAD, PROMPT)

    def test_acceptance_of_every_draft(self, engine: Engine) -> None:
        """One entry per emitted token: what a look-up or a recorded drafter proposed, or a model's probabilities."""
        trace = engine.trace_target(WORKLOAD, PROMPT)
        for draft in engine.drafts:
            acceptance = engine.trace_draft(WORKLOAD, PROMPT, trace, draft, MAX_LENGTH)
            assert acceptance.draft_digest == draft.digest
            assert isinstance(acceptance, LookupTrace) or draft.kind != "ngram"
            if isinstance(acceptance, LookupTrace):
                assert len(acceptance.proposed) == 24
            else:
                assert set(acceptance.accept_probs) <= {0.0, 1.0}

    def test_step_times_cover_what_rounds_use(self, engine: Engine) -> None:
        """The target at widths 1..k+1, a draft model at 1, 2 and maybe more, a look-up at every length; else rounds.

        vLLM times those of sparse lengths on a CPU.
        """
        times = engine.time_steps(WORKLOAD, 32, MAX_LENGTH)
        whole = engine.capabilities.times == "rounds"
        lengths = sparse_lengths(MAX_LENGTH) if engine.capabilities.name == "vllm" else range(1, MAX_LENGTH + 1)
        assert set(times[engine.target.run_digest].samples_s) == ({1} if whole else {1, 2, 3, 4, 5})
        for draft in engine.drafts:
            widths = {1 + length for length in lengths} if whole else {1, 2, 3, 4} if draft.kind == "ngram" else {1, 2}
            more = {1} if whole else set() if draft.kind == "ngram" else set(CATCH_UP_WIDTHS)
            assert widths <= set(times[draft.digest].samples_s) <= widths | more
            assert times[draft.digest].context_length == 32
            assert not whole or min(map(len, times[draft.digest].samples_s.values())) >= 7

    def test_real_runs_in_the_order_asked(self, engine: Engine) -> None:
        """One sample per setup, equal greedy outputs, and rounds as the walk has them, under the engine's end rule."""
        setups = _setups(engine)
        samples = engine.run_together(WORKLOAD, (PROMPT,), setups, "test 0")
        assert [sample.setup_digest for sample in samples] == [setup.digest for setup in setups]
        assert len({sample.output_digest for sample in samples}) == 1
        past_end = engine.capabilities.past_end
        asked = replace(WORKLOAD, max_new_tokens=24 + MAX_LENGTH) if past_end else WORKLOAD
        trace = engine.trace_target(asked, PROMPT)
        for setup, sample in zip(setups, samples, strict=True):
            acceptance = None
            if setup.draft is not None:
                acceptance = engine.trace_draft(asked, PROMPT, trace, setup.draft, MAX_LENGTH)
            assert dict(sample.rounds) == dict(
                expected_rounds(trace, acceptance, setup.length, 24, past_end=past_end).rounds
            )

    def test_what_it_does_not_have_is_an_error(self, engine: Engine) -> None:
        """A draft never loaded or measured is refused with a message that names it."""
        unknown = Setup(draft=Draft(kind="ngram", max_match=7, min_match=7), length=2)
        with pytest.raises(InputError):
            engine.run_together(WORKLOAD, (PROMPT,), (unknown,), "test 0")
