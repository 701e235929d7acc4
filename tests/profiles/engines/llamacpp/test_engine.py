"""llama.cpp as a measuring engine, through the package xllamacpp: its tokens, its rounds against its own counters.

Seconds are not judged here.
"""

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.builtin import TARGET
from profiles.engines.llamacpp import responses
from profiles.engines.llamacpp.engine import LlamaCppEngine
from profiles.engines.llamacpp.responses import tokens_again
from profiles.engines.llamacpp.servers import Options, Program, complete, find_program
from profiles.engines.serving.http_load import fetch
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, TargetTrace
from tests.support.tiny import LLAMA_CPP_READS, write_gguf

pytest.importorskip("xllamacpp")

DRAFT_NAME = "builtin:draft-general"
LOOK_UP = Draft(kind="ngram", max_match=3, min_match=3)
POOL = Draft(kind="native", method="ngram-mod,n-match=4")
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def program() -> Program:
    return find_program()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(threads=1, log_folder=tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def torch_engine() -> TorchEngine:
    target = loader.load(TARGET, dtype="float32", device="cpu")
    draft = loader.load(DRAFT_NAME, dtype="float32", device="cpu")
    return TorchEngine(target, {Draft(kind="model", model=draft.record): draft.model}, "cpu")


@dataclass(frozen=True)
class Case:
    """The family's target with a draft model, a look-up and a method of llama.cpp's own, and eight shipped prompts.

    `kept`: what the draft model and the look-up keep of every trace, by the draft's digest.
    """

    engine: LlamaCppEngine
    workload: Workload
    queue: tuple[Prompt, ...]
    traces: list[TargetTrace]
    kept: dict[str, list[Acceptance]]


@pytest.fixture(scope="module")
def case(program: Program, options: Options) -> Iterator[Case]:
    draft = Draft(kind="model", model=loader.describe(DRAFT_NAME, dtype="float32").record)
    described = loader.describe(TARGET, dtype="float32")
    requests = read("builtin:code")[:4] + read("builtin:prose")[:4]
    queue = tuple(tokenize(requests, described.tokenizer, 384)[0])
    workload = Workload(context_length=448, max_new_tokens=NEW_TOKENS, end_token_ids=described.end_token_ids)
    with LlamaCppEngine(described, (draft, LOOK_UP, POOL), program, options) as engine:
        traces = [engine.trace_target(workload, prompt) for prompt in queue]
        kept = {
            draft.digest: [engine.trace_draft(workload, *pair, draft, 8) for pair in zip(queue, traces, strict=True)]
            for draft in engine.drafts[:2]
        }
        yield Case(engine, workload, queue, traces, kept)
        pids = engine.pids
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def counters(url: str) -> Counter[str]:
    """llama.cpp's own counts so far."""
    lines = re.findall(r"^llamacpp:spec_decode_num_(\w+)_total (\d+)", fetch(f"{url}/metrics"), re.MULTILINE)
    return Counter({name: int(count) for name, count in lines})


def check_walk(case: Case, setup: Setup) -> None:
    """Rounds of every request, the server's counters and the tokens are what the walk over the traces says."""
    engine, workload, queue, traces = case.engine, case.workload, case.queue, case.traces
    pairs = zip(traces, case.kept[setup.draft.digest], strict=True)
    walks = [expected_rounds(trace, one, setup.length, NEW_TOKENS).rounds for trace, one in pairs]
    engine.run_together(workload, queue[:1], (setup,), "warm")
    url = engine._server(setup, workload).url
    before = counters(url)
    samples = engine.run_together(workload, queue, (setup,), "race 0")
    counted = counters(url) - before
    assert [dict(sample.rounds) for sample in samples] == [dict(one) for one in walks]
    assert [sample.output_digest for sample in samples] == [digest_of(trace.token_ids) for trace in traces]
    total: dict[tuple[int, int], float] = {}
    for one in walks:
        for pair, count in one.items():
            total[pair] = total.get(pair, 0.0) + count
    assert counted["drafts"] == sum(count for (proposed, _), count in total.items() if proposed)
    assert counted["draft_tokens"] == sum(proposed * count for (proposed, _), count in total.items())
    assert counted["accepted_tokens"] == sum(kept * count for (_, kept), count in total.items())


class TestTraces:
    """What llama.cpp tells of target and drafts."""

    def test_target_is_the_torch_engines(self, case: Case, torch_engine: TorchEngine) -> None:
        """Tokens are equal; probabilities and gaps are, to what float32 sums in another order differ by."""
        assert case.engine.target == torch_engine.target
        for prompt, trace in zip(case.queue, case.traces, strict=True):
            ours = torch_engine.trace_target(case.workload, prompt)
            assert (trace.token_ids, trace.ended) == (ours.token_ids, ours.ended)
            assert trace.target_probs == pytest.approx(ours.target_probs, abs=1e-4)
            assert trace.logit_gaps == pytest.approx(ours.logit_gaps, abs=1e-3)
        assert any(trace.ended for trace in case.traces)

    def test_draft_is_the_torch_engines(self, case: Case, torch_engine: TorchEngine) -> None:
        """Asked for one token at a time, the draft keeps what one pass of it in torch keeps."""
        draft = case.engine.drafts[0]
        for prompt, trace, found in list(zip(case.queue, case.traces, case.kept[draft.digest], strict=True))[:3]:
            ours = torch_engine.trace_draft(case.workload, prompt, trace, draft, 8)
            assert found.accept_probs == ours.accept_probs
            assert found.confidences == pytest.approx(ours.confidences, abs=1e-4)

    def test_sampled_trace(self, case: Case) -> None:
        """Probabilities are those after filters: with two tokens left they add up with those of no others."""
        sampled = replace(case.workload, temperature=0.8, top_k=2, seed=3)
        trace, again, raw = (
            case.engine.trace_target(workload, case.queue[0])
            for workload in (sampled, sampled, replace(sampled, top_k=0))
        )
        assert all(0.0 < prob <= 1.0 for prob in trace.target_probs)
        assert trace.token_ids == again.token_ids
        assert sum(trace.target_probs) / len(trace.target_probs) > sum(raw.target_probs) / len(raw.target_probs)


class TestRounds:
    """The walk over a trace against llama.cpp's own counters: exact."""

    @pytest.mark.parametrize("length", range(1, 7))
    def test_draft_model(self, case: Case, length: int) -> None:
        """Every length of a draft model."""
        check_walk(case, Setup(draft=case.engine.drafts[0], length=length))

    @pytest.mark.parametrize("length", range(3, 9))
    def test_look_up(self, case: Case, length: int) -> None:
        """Every length of a look-up that llama.cpp does not drop."""
        check_walk(case, Setup(draft=LOOK_UP, length=length))

    def test_rows_do_not_change_tokens(self, case: Case) -> None:
        """Four requests in flight give what one gives, plain and with a draft, and wait for each other's prefills."""
        engine, queue, traces = case.engine, case.queue, case.traces
        four = replace(case.workload, batch_size=4)
        setups = (PLAIN, Setup(draft=engine.drafts[0], length=3))
        samples = engine.run_together(four, queue, setups, "race 0")
        digests = [digest_of(trace.token_ids) for trace in traces]
        assert [sample.output_digest for sample in samples] == digests * 2
        order = [(setup.digest, prompt.digest) for setup in setups for prompt in queue]
        assert [(sample.setup_digest, sample.prompt_digest) for sample in samples] == order
        kept = case.kept[engine.drafts[0].digest]
        for sample, trace, one in zip(samples[len(queue) :], traces, kept, strict=True):
            assert dict(sample.rounds) == dict(expected_rounds(trace, one, 3, NEW_TOKENS).rounds)
        assert any(sample.refills for sample in samples)
        size = samples[0].output_tokens
        assert (dict(samples[0].rounds), dict(samples[0].shapes)) == ({(0, 0): size - 1}, {(1, 0, 0): size - 1})
        assert all(sample.ttft_s > 0.0 and sample.decode_s > 0.0 for sample in samples)

    def test_sampled(self, case: Case) -> None:
        """The same seed gives the plain output again but for sums in another order, and then the walk is exact."""
        sampled = replace(case.workload, temperature=0.8, top_k=20, seed=5)
        engine, queue = case.engine, case.queue[:4]
        own = [engine.trace_target(sampled, prompt) for prompt in queue]
        kept = [engine.trace_draft(sampled, *pair, engine.drafts[0], 3) for pair in zip(queue, own, strict=True)]
        samples = engine.run_together(sampled, queue, (Setup(draft=engine.drafts[0], length=3),), "race 0")
        equal = 0
        for sample, trace, one in zip(samples, own, kept, strict=True):
            if sample.output_digest == digest_of(trace.token_ids):
                equal += 1
                assert dict(sample.rounds) == dict(expected_rounds(trace, one, 3, NEW_TOKENS).rounds)
        assert equal >= len(queue) // 2

    def test_a_pool_is_emptied_before_every_queue(self, case: Case) -> None:
        """ngram-mod remembers earlier requests; run again it is a new server, and does the same."""
        setups, starts = (Setup(draft=POOL, length=6),), case.engine.num_starts
        first, again = (
            case.engine.run_together(case.workload, case.queue[:3], setups, f"race {turn}") for turn in range(2)
        )
        assert case.engine.num_starts == starts + 2
        assert [sample.rounds for sample in first] == [sample.rounds for sample in again]
        assert any(proposed for sample in first for proposed, _ in sample.rounds)


class TestStepTimes:
    """Whole rounds by the tokens they verify."""

    def test_every_width_of_a_batch(self, case: Case) -> None:
        """The target has plain rounds alone; a draft has all its lengths, a look-up rounds without a match too."""
        times = case.engine.time_steps(replace(case.workload, batch_size=3), 200, 1)
        model, look_up, _ = case.engine.drafts
        widths = {digest: set(part.samples_s) for digest, part in times.items()}
        assert widths == {case.engine.target.run_digest: {1}, model.digest: {2}, look_up.digest: {1, 2}}
        for part in times.values():
            assert (part.batch_size, part.context_length) == (3, 200)
            assert all(len(samples) >= 7 for samples in part.samples_s.values())


class TestRefusals:
    """What cannot be asked, and what goes wrong."""

    def test_what_it_does_not_have(self, case: Case, program: Program, options: Options) -> None:
        """Kinds, lengths and sizes of another engine, with one line each."""
        engine, workload, queue, model = case.engine, case.workload, case.queue, case.engine.drafts[0]
        asked = {
            "drops look-up drafts shorter than the match": Setup(draft=LOOK_UP, length=2),
            "is not one of this engine's": Setup(draft=Draft(kind="ngram", max_match=2, min_match=2), length=2),
            "has no stop before a proposal": Setup(draft=model, length=2, stop_below=0.5),
            "with speculation length 65": Setup(draft=model, length=65),
        }
        for said, setup in asked.items():
            with pytest.raises(InputError, match=said):
                engine.run_together(workload, queue, (setup,), "race 0")
        with pytest.raises(InputError, match="allowed are 100 together"):
            engine.run_together(replace(workload, context_length=100), queue, (PLAIN,), "race 0")
        target = loader.describe(TARGET, dtype="float32")
        wrong = {
            "one size of n-gram": Draft(kind="ngram", max_match=4, min_match=2),
            "no early_exit drafts": Draft(kind="early_exit", num_layers=2),
            "methods are eagle3, mtp": Draft(kind="native", method="medusa"),
            "options behind it like": Draft(kind="native", method="ngram-mod,n-match"),
            "NAME=VALUE is needed": Draft(kind="native", method="ngram-mod,n-match=a/b"),
        }
        for said, draft in wrong.items():
            with pytest.raises(InputError, match=said):
                LlamaCppEngine(target, (draft,), program, options)

    def test_what_llama_cpp_refuses(
        self, program: Program, options: Options, tiny_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        """A server that ends at once is told with its own words; a draft that it cannot use is an error."""
        path = write_gguf(tmp_path / "other.gguf", tiny_folders["llama"], **LLAMA_CPP_READS)
        target = loader.describe(TARGET, dtype="float32")
        draft = Draft(kind="model", model=loader.describe(str(path), dtype="float32").record)
        short = Workload(context_length=128, max_new_tokens=16, end_token_ids=target.end_token_ids)
        prompt = Prompt(domain="a", token_ids=tuple(range(400, 440)))
        wrong = replace(program, command=(*program.command, "--draft-max", "3"))
        for drafts, run, words in (((), wrong, "--draft-max"), ((draft,), program, r"drafted nothing: .*vocab")):
            setups = tuple(Setup(draft=draft, length=2) for draft in drafts) or (PLAIN,)
            with LlamaCppEngine(target, drafts, run, options) as engine, pytest.raises(EngineError, match=words):
                engine.run_together(short, (prompt,), setups, "race 0")

    def test_killed_under_load(self, case: Case) -> None:
        """The error names the signal and the log; the next call starts another server."""
        engine, workload, queue, traces = case.engine, case.workload, case.queue, case.traces
        engine.run_together(workload, queue[:1], (PLAIN,), "warm")
        killed: list[int] = []

        def kill() -> None:
            time.sleep(0.1)
            for pid in engine._server(PLAIN, workload).pids[1:]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(EngineError, match=r"SIGKILL.*log:"):
            engine.run_together(replace(workload, end_token_ids=()), queue * 20, (PLAIN,), "race 0")
        thread.join()
        assert killed
        assert not any(psutil.pid_exists(pid) for pid in killed)
        samples = engine.run_together(workload, queue[:2], (PLAIN,), "race 0")
        assert [sample.output_digest for sample in samples] == [digest_of(trace.token_ids) for trace in traces[:2]]


def test_tokens_again(case: Case) -> None:
    """Bytes that never make a character come as tokens, in a request that is not streamed."""
    workload = case.workload
    tokenizer = loader.describe(TARGET, dtype="float32").tokenizer
    byte = tokenizer.convert_tokens_to_ids("æ")  # the first byte of three
    server = case.engine._server(PLAIN, workload)
    body = responses.body_of(workload, case.queue[0].token_ids, logit_bias=[[byte, 1000.0]], n_predict=5)
    [run] = complete(server, [body], 1)
    assert run.token_ids == (byte,) * 5
    assert sum((run.rounds or {}).values()) == 4
    with pytest.raises(EngineError, match="answers 404"):
        tokens_again(f"{server.url}/nowhere", body)
