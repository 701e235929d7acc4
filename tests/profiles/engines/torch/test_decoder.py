"""Lossless decoding: greedy speculative output equals plain output, and real rounds equal the walk, exactly."""

import functools
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.acceptance.ngram import trace_lookup
from profiles.acceptance.ngram_index import NgramIndex
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.decoder import Decoder
from profiles.engines.torch.engine import TorchEngine
from profiles.engines.torch.sampling import KeyedRandom
from profiles.engines.torch.trace import trace_model
from profiles.models import loader
from profiles.models.early_exit import early_exit
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import BadNumbersError, InputError, ModelError
from profiles.records.evidence import Acceptance, TargetTrace
from profiles.timing.clock import Clock
from tests.support.toys import TableModel, near, run, run_queue

LENGTHS, NEW_TOKENS = (*range(1, 9), 11, 16), 24
NGRAM = Draft(kind="ngram", max_match=3, min_match=1)


@pytest.fixture(autouse=True)
def _cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are looked at, not seconds: no run is made to be thrown away."""
    monkeypatch.setattr(TorchEngine, "_warm_up", lambda *_: None)


@pytest.fixture(scope="module")
def engine(tiny_folders: dict[str, Path]) -> TorchEngine:
    """A tiny random target with a draft of every kind; the model draft is another random model."""
    target = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu")
    other = loader.load(str(tiny_folders["qwen2"]), dtype="float32", device="cpu")
    drafts = {
        Draft(kind="model", model=target.record): target.model,
        Draft(kind="model", model=other.record): other.model,
        Draft(kind="early_exit", num_layers=2): early_exit(target, 2),
        NGRAM: None,
    }
    return TorchEngine(target, drafts, "cpu")


def _prompts() -> list[Prompt]:
    return [
        Prompt(domain="a", token_ids=tuple(range(20, 44))),
        Prompt(domain="b", token_ids=(30, 31, 32, 30, 31, 32, 30, 31)),
    ]


def _workload(engine: TorchEngine, prompt: Prompt, ends: bool) -> Workload:
    """With `ends`, a token that plain decoding emits midway is declared an end token."""
    workload = Workload(context_length=128, max_new_tokens=NEW_TOKENS)
    if not ends:
        return workload
    emitted = engine.trace_target(workload, prompt).token_ids
    return replace(workload, end_token_ids=(emitted[len(emitted) // 2],))


@pytest.mark.parametrize("ends", [False, True], ids=["to the limit", "to an end token"])
@pytest.mark.parametrize("kind", range(4), ids=["self", "other model", "early exit", "ngram"])
def test_greedy_output_and_rounds(engine: TorchEngine, kind: int, ends: bool) -> None:
    """Up to k = 16 the output equals plain decoding token for token and the rounds equal the walk's exactly."""
    draft = engine.drafts[kind]
    for prompt in _prompts():
        workload = _workload(engine, prompt, ends)
        trace = engine.trace_target(workload, prompt)
        acceptance = engine.trace_draft(workload, prompt, trace, draft, 16)
        setups = (PLAIN, *(Setup(draft=draft, length=length) for length in LENGTHS))
        plain, *samples = engine.run_together(workload, (prompt,), setups, "test")
        assert dict(plain.rounds) == dict(expected_rounds(trace, None, 0, NEW_TOKENS).rounds)
        for length, sample in zip(LENGTHS, samples, strict=True):
            assert sample.output_digest == plain.output_digest
            assert dict(sample.rounds) == dict(expected_rounds(trace, acceptance, length, NEW_TOKENS).rounds)


def test_the_target_as_its_own_draft_is_always_kept(engine: TorchEngine) -> None:
    """A stale or missing key in the draft's cache would show as a rejection here."""
    prompt = _prompts()[0]
    workload = Workload(context_length=128, max_new_tokens=40)
    (sample,) = engine.run_together(workload, (prompt,), (Setup(draft=engine.drafts[0], length=4),), "test")
    assert all(kept == proposed for proposed, kept in sample.rounds)


def test_stopping_early_keeps_the_output(engine: TorchEngine) -> None:
    """`stop_below` shortens rounds and never changes what is emitted."""
    prompt = _prompts()[0]
    workload = Workload(context_length=128, max_new_tokens=40)
    draft = engine.drafts[1]
    setups = (PLAIN, Setup(draft=draft, length=6), Setup(draft=draft, length=6, stop_below=0.5))
    plain, full, stopped = engine.run_together(workload, (prompt,), setups, "test")
    assert plain.output_digest == full.output_digest == stopped.output_digest
    assert _drafted(stopped.rounds) < _drafted(full.rounds)


@pytest.mark.parametrize("stop_below", [0.2, 0.5, 0.8])
def test_rounds_that_stop_are_replayed_from_the_trace(engine: TorchEngine, stop_below: float) -> None:
    """Rounds and acceptances exactly; what is drafted past a rejection is a mean, so drafted tokens only roughly."""
    workload = Workload(context_length=128, max_new_tokens=40)
    setup = Setup(draft=engine.drafts[1], length=6, stop_below=stop_below)
    real: Counter[int] = Counter()
    replayed: Counter[int] = Counter()
    drafted, expected = 0.0, 0.0
    for prompt in _prompts():
        (sample,) = engine.run_together(workload, (prompt,), (setup,), "test")
        trace = engine.trace_target(workload, prompt)
        acceptance = engine.trace_draft(workload, prompt, trace, engine.drafts[1], 6)
        counts = expected_rounds(trace, acceptance, 6, 40, stop_below=stop_below)
        for (proposed, accepted), count in sample.rounds.items():
            real[accepted] += count
            drafted += proposed * count
        for (proposed, accepted), count in counts.rounds.items():
            replayed[accepted] += int(count)
            expected += proposed * count
    assert replayed == real
    assert expected == pytest.approx(drafted, rel=0.35)


def _drafted(rounds: object) -> int:
    return sum(proposed * count for (proposed, _), count in rounds.items())  # type: ignore[attr-defined]


def test_lookup_prefers_the_longest_match_and_its_earliest_place() -> None:
    """The rule of transformers' prompt look-up, on literal tokens."""
    index = NgramIndex(2, 1)
    assert index.look_up([1, 2, 9, 1, 3, 1, 2], 3) == [9, 1, 3]
    assert index.look_up([1, 2, 9, 1, 3, 1, 2, 1], 2) == [2, 9]  # (2, 1) is new
    assert index.look_up([1, 2, 9, 1, 3, 1, 2, 1, 7], 2) == []


def test_refusals_before_a_run(engine: TorchEngine) -> None:
    """A batch the engine lacks, a context beyond the model and a draft not loaded are named."""
    prompt = _prompts()[0]
    with pytest.raises(InputError, match="batch size 65"):
        engine.run_together(Workload(batch_size=65, context_length=64, max_new_tokens=8), (prompt,), (PLAIN,), "test")
    with pytest.raises(ModelError, match="positions"):
        engine.trace_target(Workload(context_length=9000, max_new_tokens=8000), prompt)
    unknown = Setup(draft=Draft(kind="ngram", max_match=9, min_match=9), length=1)
    with pytest.raises(InputError, match="max=9"):
        engine.run_together(Workload(context_length=64, max_new_tokens=8), (prompt,), (unknown,), "test")


def test_logits_that_are_not_finite_are_an_error() -> None:
    """NaN never becomes a token."""
    model = TableModel(seed=0)
    model.table[1] = float("nan")
    with pytest.raises(BadNumbersError, match="not finite"):
        run(model, None, 0, Workload(context_length=64, max_new_tokens=4), Prompt(domain="x", token_ids=(1,)))


def test_a_request_waits_from_when_its_row_is_free() -> None:
    """Rows are prefilled one after another: the second waits for the first, as a server's client would."""
    target, readings = TableModel(seed=5), itertools.count()
    workload = Workload(batch_size=2, context_length=64, max_new_tokens=4)
    decoder = Decoder(target.rows(2), None, KeyedRandom(2, workload, target.device))
    prompts = [Prompt(domain="toy", token_ids=(number, 1, 2)) for number in range(4)]
    runs = decoder.run(prompts, Clock("cpu", now=lambda: float(next(readings))))
    assert [run.ttft_s for run in runs] == [1.0, 2.0, 1.0, 2.0]


TOY = TableModel(seed=5, scale=2.0, vocabulary=12)
TOY_DRAFTS = {  # the early exit stands for any draft model
    "model": Draft(kind="early_exit", num_layers=1),
    "ngram": Draft(kind="ngram", max_match=2, min_match=1),
}
SAMPLED = Workload(batch_size=100, context_length=256, max_new_tokens=128, temperature=0.9, top_p=0.95, seed=0)
# the first token, out of the vocabulary, tells the prompts apart: each has random numbers of its own
TOY_PROMPTS = [Prompt(domain="toy", token_ids=(12 + position, 1, 2, 3, 4, 5, 1)) for position in range(1000)]


@functools.cache
def _toy_traces(kind: str) -> list[tuple[TargetTrace, Acceptance]]:
    """Plain outputs and what a draft gets accepted of each, for every length up to 16."""
    plain = run_queue(TOY, None, 0, SAMPLED, TOY_PROMPTS, watch=True)
    traces = [run.target_trace(prompt) for prompt, run in zip(TOY_PROMPTS, plain, strict=True)]
    draft, draft_model = TOY_DRAFTS[kind], near(TOY, 6, 0.6)
    accepted = (
        trace_lookup(draft, prompt, trace, 16)
        if kind == "ngram"
        else trace_model(draft_model, draft, SAMPLED, prompt, trace)
        for prompt, trace in zip(TOY_PROMPTS, traces, strict=True)
    )
    return list(zip(traces, accepted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("length", "size"), [(1, 300), (4, 600), (16, 1000)])  # long rounds vary more
@pytest.mark.parametrize("kind", TOY_DRAFTS)
def test_sampled_rounds_in_expectation(kind: str, length: int, size: int) -> None:
    """When sampling, the mean of the walk over traces equals the mean of real rounds: |z| < 3, error under 1 %."""
    traces = _toy_traces(kind)[:size]
    walked = [expected_rounds(*pair, length, SAMPLED.max_new_tokens).num_rounds for pair in traces]
    other = replace(SAMPLED, seed=1)  # other random numbers: the two means are independent
    runs = run_queue(TOY, "ngram" if kind == "ngram" else near(TOY, 6, 0.6), length, other, TOY_PROMPTS[:size])
    real = [generation.rounds.total() for generation in runs]
    assert abs(_z(real, walked)) < 3.0


def _z(real: list[int], walked: list[float]) -> float:
    import numpy

    means = numpy.mean(real), numpy.mean(walked)
    error = float(numpy.sqrt(numpy.var(real, ddof=1) / len(real) + numpy.var(walked, ddof=1) / len(walked)))
    assert error / means[0] < 0.01, "too few runs to tell a difference of a few percent"
    return float((means[0] - means[1]) / error)


def test_a_prompt_is_prefilled_once(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later runs decode from a copy of its cache, to the same tokens; their time to first token counts the prefill."""
    ran: list[int] = []
    step = RowModel.step

    def counted(self: RowModel, tokens: torch.Tensor, *arguments: Any, row: int | None = None, **more: Any) -> Any:
        ran.append(tokens.shape[1] if row is not None else 0)
        return step(self, tokens, *arguments, row=row, **more)

    monkeypatch.setattr(RowModel, "step", counted)
    workload = Workload(context_length=64, max_new_tokens=8)
    first, second = (Prompt(domain="a", token_ids=tuple(range(start, start + 20))) for start in (60, 90))
    setups = (PLAIN, Setup(draft=engine.drafts[1], length=2))
    engine.run_together(workload, (second,), setups, "test 0")
    before = sum(map(bool, ran))
    outputs = [engine.run_together(workload, (first,), setups, f"test {number}") for number in range(3)]
    assert sum(map(bool, ran)) - before == 2  # the target's and the draft's
    assert len({sample.output_digest for samples in outputs for sample in samples}) == 1
    assert all(sample.ttft_s > 0.0 for samples in outputs for sample in samples)
