"""The vLLM adapter over a real vLLM on the processor: what it forecasts is what vLLM's own counters say.

Run by `make test-vllm`, which installs the lane (gigabytes).
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.engines.torch.engine import TorchEngine
from profiles.engines.vllm.config import VllmOptions
from profiles.engines.vllm.engine import VllmEngine
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, AcceptanceTrace, Sample, TargetTrace
from tests.lanes.places import RUNNING
from tests.support.tiny import write_model

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not RUNNING.is_whole, reason="no lane: make test-vllm")]
QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # on a shared machine
LONGEST, NEW = 6, 64
WORKLOAD = Workload(context_length=240, max_new_tokens=NEW)
LONGER = dataclasses.replace(WORKLOAD, context_length=240 + LONGEST, max_new_tokens=NEW + LONGEST)
NGRAMS = tuple(Draft(kind="ngram", max_match=longest, min_match=shortest) for longest, shortest in ((3, 1), (4, 2)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The shipped pair in both engines, 8 prompts, and traces as much longer as a round can pass the end."""

    vllm: VllmEngine
    torch: TorchEngine
    draft: Draft
    prompts: tuple[Prompt, ...]
    traces: tuple[TargetTrace, ...]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    target, small = (
        loader.load(f"builtin:{name}", dtype="float32", device="cpu") for name in ("target", "draft-general")
    )
    draft = Draft(kind="model", model=small.record)
    requests = read("builtin:code")[:4] + read("builtin:prose")[:4]
    found, _ = tokenize(requests, target.tokenizer, 160)
    torch = TorchEngine(target, {draft: small.model}, "cpu")
    options = VllmOptions(
        python=str(RUNNING.python), max_length=LONGEST, max_alive=6, log_folder=tmp_path_factory.mktemp("logs")
    )
    with pytest.MonkeyPatch.context() as patch, VllmEngine(target.record, (draft, *NGRAMS), options) as vllm:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        traces = tuple(vllm.trace_target(LONGER, prompt) for prompt in found)
        yield Pair(vllm=vllm, torch=torch, draft=draft, prompts=tuple(found), traces=traces)
    assert vllm.pids == ()
    words = [word for child in psutil.Process().children(recursive=True) for word in child.cmdline()]
    assert not [word for word in words if word.endswith("vllm/worker.py")]


@pytest.fixture(scope="module")
def plain(pair: Pair) -> tuple[Sample, ...]:
    return pair.vllm.run_together(WORKLOAD, pair.prompts, (PLAIN,), "test 0")


def accepted(pair: Pair, draft: Draft) -> list[Acceptance]:
    return [
        pair.vllm.trace_draft(LONGER, prompt, trace, draft, LONGEST)
        for prompt, trace in zip(pair.prompts, pair.traces, strict=True)
    ]


def totals(rounds: Mapping[tuple[int, int], float]) -> dict[str, list[float]]:
    """Rounds as vLLM's counters tell them: those that proposed nothing are not counted."""
    proposing = {counted: number for counted, number in rounds.items() if counted[0] > 0}
    return {
        "drafts": [sum(proposing.values())],
        "draft_tokens": [sum(proposed * number for (proposed, _), number in proposing.items())],
        "accepted_tokens": [sum(kept * number for (_, kept), number in proposing.items())],
        "accepted_tokens_per_pos": [
            sum(number for (_, kept), number in proposing.items() if kept > place) for place in range(LONGEST)
        ],
    }


def test_counters_are_what_the_walk_says(pair: Pair, plain: tuple[Sample, ...]) -> None:
    """A draft model and look-ups with two windows at three lengths: rounds, drafted and accepted tokens by position.

    Every prompt's own rounds and vLLM's counters equal the walk over the plain trace, every output the plain one, and
    no length needs another start.
    """
    starts = set()
    batch = dataclasses.replace(WORKLOAD, batch_size=8)
    for draft in (pair.draft, *NGRAMS):
        acceptances = accepted(pair, draft)
        for length in (1, 3, LONGEST):
            setup = Setup(draft=draft, length=length)
            pair.vllm.run_together(batch, pair.prompts[:1], (setup,), "warm-up 0")
            before = pair.vllm.counters(setup, batch)
            samples = pair.vllm.run_together(batch, pair.prompts, (setup,), "test 0")
            after = pair.vllm.counters(setup, batch)
            walks = [
                expected_rounds(trace, acceptance, length, NEW, past_end=True).rounds
                for trace, acceptance in zip(pair.traces, acceptances, strict=True)
            ]
            assert [dict(one.rounds) for one in samples] == [dict(one) for one in walks]
            counted = {name: [new - old for new, old in zip(after[name], before[name], strict=True)] for name in after}
            assert counted == totals(sum(map(Counter, walks), Counter()))
            assert [one.output_digest for one in samples] == [one.output_digest for one in plain]
            starts.add((draft.kind, pair.vllm.num_starts))
    assert len(starts) == 2


def test_traces_equal_torch_s(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, the draft's hits and its confidences are those of our own engine, float32 on both sides.

    Recorded in the scheduler, or in versions without it through log-probabilities.
    """
    for prompt, trace in zip(pair.prompts[::4], pair.traces[::4], strict=True):
        ours = pair.torch.trace_target(LONGER, prompt)
        assert ours.token_ids == trace.token_ids
        assert ours.target_probs == pytest.approx(trace.target_probs, abs=1e-4)
        assert ours.logit_gaps == pytest.approx(trace.logit_gaps, abs=1e-3)
        own = pair.torch.trace_draft(LONGER, prompt, trace, pair.draft, LONGEST)
        recorded = pair.vllm.trace_draft(LONGER, prompt, trace, pair.draft, LONGEST)
        for length in range(1, LONGEST + 1):
            of_torch, of_vllm = (expected_rounds(trace, one, length, NEW, past_end=True) for one in (own, recorded))
            assert of_torch.rounds == of_vllm.rounds
        with monkeypatch.context() as patch:
            patch.setattr(pair.vllm, "_records", False)
            theirs = pair.vllm.trace_draft(LONGER, prompt, trace, pair.draft, LONGEST)
            looked_up = [pair.vllm.trace_draft(LONGER, prompt, trace, draft, LONGEST) for draft in NGRAMS]
        assert looked_up == [pair.vllm.trace_draft(LONGER, prompt, trace, draft, LONGEST) for draft in NGRAMS]
        assert isinstance(theirs, AcceptanceTrace)
        assert isinstance(own, AcceptanceTrace)
        assert theirs.accept_probs == own.accept_probs
        assert theirs.confidences == pytest.approx(own.confidences, abs=1e-4)


def test_a_batch_emits_what_one_request_does(pair: Pair, plain: tuple[Sample, ...]) -> None:
    """Eight in flight: the outputs and each prompt's own rounds of one at a time; every round is as wide as drafted."""
    setup = Setup(draft=pair.draft, length=3)
    alone = pair.vllm.run_together(WORKLOAD, pair.prompts, (setup,), "test 0")
    batch = dataclasses.replace(WORKLOAD, batch_size=8)
    together = pair.vllm.run_together(batch, pair.prompts, (PLAIN, setup), "test 0")
    assert [one.output_digest for one in together] == [one.output_digest for one in plain] * 2
    assert [dict(one.rounds) for one in together[8:]] == [dict(one.rounds) for one in alone]
    assert {width for one in together[8:] for width, _, _ in one.shapes} == {4}
    two = dataclasses.replace(WORKLOAD, batch_size=2)
    refilled = pair.vllm.run_together(two, pair.prompts, (setup,), "test 0")
    assert sum(one.refills for one in refilled) >= 5  # six prompts come while another row is under way, or as it ends
    assert [one.output_digest for one in refilled] == [one.output_digest for one in plain]


def test_end_tokens_stop_an_output(pair: Pair) -> None:
    """The end token is the last that is kept, with a draft and without, as in our own engine."""
    prompt, trace = pair.prompts[0], pair.traces[0]
    ending = dataclasses.replace(WORKLOAD, end_token_ids=(trace.token_ids[20],))
    stopped = pair.vllm.trace_target(ending, prompt)
    assert stopped.ended
    assert stopped.token_ids == pair.torch.trace_target(ending, prompt).token_ids
    setups = (PLAIN, Setup(draft=pair.draft, length=4), Setup(draft=NGRAMS[0], length=4))
    samples = pair.vllm.run_together(ending, (prompt,), setups, "test 0")
    assert {one.output_tokens for one in samples} == {len(stopped.token_ids)}
    assert len({one.output_digest for one in samples}) == 1


def test_sampling_with_a_draft_is_refused(pair: Pair) -> None:
    """By this version on the CPU; run all the same, the comparison with plain sampling sees that it is wrong."""
    sampled = dataclasses.replace(WORKLOAD, temperature=0.8, batch_size=8)
    setup = Setup(draft=pair.draft, length=3)
    with pytest.raises(InputError, match=r"temperature 0.8 with a draft: vllm 0\.32"):
        pair.vllm.run_together(sampled, pair.prompts, (setup,), "test 0")
    with pytest.raises(EngineError, match="writes another text than plain decoding"):
        pair.vllm.check_sampling(sampled, pair.prompts, setup)
    pair.vllm.check_sampling(sampled, pair.prompts, PLAIN)
    trace = pair.vllm.trace_target(sampled, pair.prompts[0])
    ours = pair.torch.trace_target(WORKLOAD, pair.prompts[0])
    assert len(trace.token_ids) == len(ours.token_ids)
    assert all(0.0 < one <= 1.0 for one in trace.target_probs)


def test_another_vocabulary_is_refused_in_vllm_s_words(pair: Pair, tmp_path: Path) -> None:
    """One line, and the engine goes on."""
    folder = write_model(tmp_path / "other", num_layers=1)
    other = Draft(kind="model", model=loader.describe(str(folder), dtype="float32").record)
    options = VllmOptions(python=str(RUNNING.python), log_folder=tmp_path)
    with VllmEngine(pair.vllm.target, (other,), options) as engine:
        with pytest.raises(EngineError, match="vocab") as raised:
            engine.run_together(WORKLOAD, pair.prompts[:1], (Setup(draft=other, length=2),), "test 0")
        assert "\n" not in str(raised.value)
        assert len(engine.run_together(WORKLOAD, pair.prompts[:1], (PLAIN,), "test 0")) == 1


def test_a_killed_engine_is_an_error_and_the_next_call_works(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a queue: one line, and asked again the same outputs."""
    setup = Setup(draft=pair.draft, length=2)
    expected = pair.vllm.run_together(WORKLOAD, pair.prompts[:2], (setup,), "test 0")
    decode = pair.vllm._decode

    def killed(*asked: object) -> object:
        processes = map(psutil.Process, pair.vllm.pids)
        for worker in [process for process in processes if process.cmdline()[-1].endswith("vllm/worker.py")]:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended with its supervisor
                worker.kill()
        return decode(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(pair.vllm, "_decode", functools.partial(killed))
    with pytest.raises(EngineError):
        pair.vllm.run_together(WORKLOAD, pair.prompts[:2], (setup,), "test 0")
    monkeypatch.undo()
    again = pair.vllm.run_together(WORKLOAD, pair.prompts[:2], (setup,), "test 0")
    assert [one.output_digest for one in again] == [one.output_digest for one in expected]
