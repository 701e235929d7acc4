"""The vLLM adapter against a worker without vLLM: what it makes of answers, of faults, and of questions not allowed."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from profiles.acceptance.expected_rounds import combine, expected_rounds
from profiles.engines.base import Engine
from profiles.engines.serving.base import check_means
from profiles.engines.vllm.client import WorkerClient
from profiles.engines.vllm.config import EngineKey, VllmOptions, engine_arguments, start_arguments
from profiles.engines.vllm.engine import VllmEngine
from profiles.models.loader import describe
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload, digest_of
from profiles.records.errors import BadNumbersError, EngineError, InputError, ModelError, OutOfMemoryError
from profiles.records.evidence import LookupTrace
from tests import ROOT
from tuner.forecast.evidence import gather
from tuner.search.control import objection
from tuner.search.pairs import run_pairs

WORKLOAD = Workload(context_length=64, max_new_tokens=8)
PROMPTS = (Prompt(domain="a", token_ids=(5, 6, 7)), Prompt(domain="b", token_ids=(9, 8)))
TARGET, OTHER = (describe(f"builtin:{name}", dtype="float32").record for name in ("target", "draft-general"))
MODEL = Draft(kind="model", model=OTHER)
NGRAM = Draft(kind="ngram", max_match=3, min_match=1)
NATIVE = Draft(kind="native", method="eagle3,draft-tensor-parallel-size=1", model=OTHER)
OPTIONS = VllmOptions(
    python=sys.executable, worker=ROOT / "tests/support/fake_vllm_worker.py", timeout_s=2.0, max_batch_size=4
)
K3 = Setup(draft=MODEL, length=3)


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[VllmEngine]:
    """An adapter over the fake worker, which leaves no process behind."""
    with VllmEngine(TARGET, (MODEL, NGRAM, NATIVE), replace(OPTIONS, log_folder=tmp_path)) as engine:
        yield engine
    assert_gone(engine)


def assert_gone(engine: VllmEngine) -> None:
    assert engine.pids == ()
    left = psutil.Process().children(recursive=True)
    assert not [child for child in left if any("fake_vllm_worker" in word for word in child.cmdline())]


def test_samples_are_the_worker_s(vllm: VllmEngine) -> None:
    """A sample per setup and prompt: times as differences, rounds and widths counted, tokens by their digest."""
    engine: Engine = vllm
    samples = engine.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")
    assert [one.setup_digest for one in samples] == [PLAIN.digest] * 2 + [K3.digest] * 2
    assert [one.prompt_digest for one in samples[:2]] == [prompt.digest for prompt in PROMPTS]
    plain, drafted = samples[0], samples[2]
    assert (plain.ttft_s, plain.decode_s, plain.output_tokens, plain.refills) == (0.5, 2.0, 8, 2)
    assert (dict(plain.rounds), dict(plain.shapes)) == ({(0, 0): 7}, {(1, 0, 0): 7})
    assert (dict(drafted.rounds), dict(drafted.shapes)) == ({(3, 1): 4}, {(4, 0, 0): 4})
    assert plain.output_digest == drafted.output_digest == digest_of(list(range(18, 26)))


def test_traces_are_the_worker_s(vllm: VllmEngine) -> None:
    """Probabilities and gaps from log-probabilities; of every draft what it proposes beside plain decoding."""
    trace = vllm.trace_target(WORKLOAD, PROMPTS[0])
    assert trace.token_ids == tuple(range(18, 26))
    assert trace.target_probs == pytest.approx([0.6065] * 8, abs=1e-4)
    assert trace.logit_gaps == (1.5,) * 8
    for draft in vllm.capabilities.timed(vllm.drafts):
        acceptance = vllm.trace_draft(WORKLOAD, PROMPTS[0], trace, draft, 3)
        assert acceptance.proposed == (0, 3, 3, 3, 3, 3, 2, 1)
        assert acceptance.accepted == (0, 1, 1, 1, 1, 1, 1, 1)
    assert vllm.num_starts == 4


def test_a_block_draft_is_not_traced(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its method, as one that samples its proposals; one that is not known is caught by its real rounds."""
    trace = vllm.trace_target(WORKLOAD, PROMPTS[0])
    monkeypatch.setenv("FAKE_VLLM", "block")
    vllm.close()
    with pytest.raises(EngineError, match=r"after 1 tokens it proposed and accepted \[1, 1\], its trace at 3 says"):
        vllm.trace_draft(WORKLOAD, PROMPTS[0], trace, NATIVE, 3)
    monkeypatch.setenv("FAKE_VLLM", "hidden")
    vllm.close()
    with pytest.raises(EngineError, match="does not tell which tokens it proposed"):
        vllm.trace_draft(WORKLOAD, PROMPTS[0], trace, NATIVE, 3)
    blocks = tuple(replace(NATIVE, method=method) for method in ("dflash", "eagle,draft-sample-method=probabilistic"))
    with VllmEngine(TARGET, blocks, OPTIONS) as engine:
        assert engine.capabilities.timed(blocks) == ()


MIXED = Draft(kind="composite", method="eagle", model=OTHER, max_match=3, min_match=1)


def test_a_composite_is_a_look_up_before_a_head(vllm: VllmEngine, tmp_path: Path) -> None:
    """Its parts are traced, the look-up as far as it drafts; a round takes the longer proposal of the two."""
    with VllmEngine(TARGET, (MIXED,), replace(OPTIONS, log_folder=tmp_path)) as engine:
        trace = engine.trace_target(WORKLOAD, PROMPTS[0])
        lookup, head = (engine.trace_draft(WORKLOAD, PROMPTS[0], trace, part, 2) for part in MIXED.components)
        assert (lookup.max_length, head.max_length) == (8, 2)
        assert engine.num_starts == 3  # the look-up's engine, the head's, plain
        times = engine.time_steps(WORKLOAD, 48, 2)
        assert {part.name: set(times[part.digest].samples_s) for part in MIXED.components} == {
            "ngram:max=3,min=1": {1, 2, 3, 5, 9},
            MIXED.components[1].name: {2, 3},
        }
        [sample, _] = engine.run_together(WORKLOAD, PROMPTS, (Setup(draft=MIXED, length=2),), "test 0")
        assert dict(sample.rounds) == {(8, 1): 4}
    walked = expected_rounds(trace, combine([lookup, head]), 2, 8, past_end=True)
    assert dict(walked.rounds) == {(7, 1): 1, (5, 1): 1, (3, 1): 1, (1, 1): 1}


@pytest.mark.parametrize(("fault", "reason"), [("lacks", "EngineError"), ("crowds", "OutOfMemoryError")])
def test_a_draft_that_cannot_start_is_a_row(monkeypatch: pytest.MonkeyPatch, fault: str, reason: str) -> None:
    """A method that the version lacks, or a draft that does not fit beside the target: the others go on."""
    monkeypatch.setenv("FAKE_VLLM", f"{fault}:eagle3")
    with VllmEngine(TARGET, (MODEL, NATIVE), OPTIONS) as engine:
        evidence = gather(engine, WORKLOAD, PROMPTS, (1, 2))
        [row] = evidence.infeasible
        assert (row.setup.draft, row.reason) == (NATIVE, reason)
        assert evidence.drafts == (MODEL,)
        assert engine.memory["plain"]["kv_tokens"] - engine.memory[MODEL.name]["kv_tokens"] == 1024


def test_engine_arguments_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are JSON where they can be; what draftpick sets itself is refused."""
    given = engine_arguments(["--tensor-parallel-size=2", "kv-cache-dtype=fp8"])
    assert given == {"tensor_parallel_size": 2, "kv_cache_dtype": "fp8"}
    with VllmEngine(TARGET, (), replace(OPTIONS, given=given)) as engine:
        assert json.loads(engine.environment.engine_options or "")["given"] == given
    key = EngineKey(model=TARGET.name)
    started = start_arguments(key, "float32", 128, replace(OPTIONS, given=given), on_cpu=False)
    assert "distributed_executor_backend" not in started["options"]
    for text in ("seed=1", "fast", "=2"):
        with pytest.raises(InputError, match="--engine-arg"):
            engine_arguments([text])


def test_an_unknown_version_is_traced_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said in one line: hits from ranks, look-ups without an engine, heads at every length."""
    monkeypatch.setenv("FAKE_VLLM_VERSION", "0.31.0+cpu")
    with VllmEngine(TARGET, (MODEL, NGRAM, NATIVE), replace(OPTIONS, log_folder=tmp_path)) as vllm:
        assert "recorded in 0.32.0 to 0.33.0" in vllm.notes[0]
        assert vllm.capabilities.timed(vllm.drafts) == (MODEL, NGRAM)
        trace = vllm.trace_target(WORKLOAD, PROMPTS[0])
        accepted = vllm.trace_draft(WORKLOAD, PROMPTS[0], trace, MODEL, 3)
        assert accepted.accept_probs == (0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
        assert len(accepted.confidences) == 8
        assert isinstance(vllm.trace_draft(WORKLOAD, PROMPTS[0], trace, NGRAM, 3), LookupTrace)
        assert vllm.num_starts == 2


def test_rounds_are_timed_whole(vllm: VllmEngine) -> None:
    """The target has width 1, a traced draft 1 + k, a look-up also the round that found nothing."""
    times = vllm.time_steps(WORKLOAD, 48, 3)
    assert {part: set(one.samples_s) for part, one in times.items()} == {
        TARGET.run_digest: {1},
        MODEL.digest: {2, 3, 4},
        NGRAM.digest: {1, 2, 3, 4},
        NATIVE.digest: {2, 3, 4},
    }
    assert all(len(seconds) >= 7 for one in times.values() for seconds in one.samples_s.values())
    assert times[MODEL.digest].context_length == 48


def test_half_the_threads_in_plain_decoding_are_told(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run says how many threads its process has; those of the two arms must be equal."""
    monkeypatch.setenv("FAKE_VLLM", "halved:")
    setup = Setup(draft=NGRAM, length=3)
    pairs = run_pairs(vllm, WORKLOAD, PROMPTS, setup, "proof 0")
    reason = objection(setup, pairs, batch_size=1, greedy=True)
    assert reason.startswith("plain decoding ran with threads=1, ngram:max=3,min=1 k=3 with threads=2")


def test_environment_says_how_it_was_started(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are the engine's own; its options and the variables that it depends on are part of the key."""
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    found = vllm.environment
    assert (found.engine, found.engine_version, found.threads, found.torch) == ("vllm", "0.32.0+cpu", 3, "2.13.0+cpu")
    assert found.engine_options == '{"eager":true,"max_num_seqs":4,"prefix_caching":false}'
    assert vllm.capabilities.origin == "vllm 0.32.0+cpu float32"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("VLLM_API_KEY", "not recorded")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with VllmEngine(TARGET, (), OPTIONS) as other:
        options = json.loads(other.environment.engine_options or "")
        assert other.environment.threads == 2  # numba's are set alike
    assert options["environment"] == {"OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "4"}


def test_a_draft_that_does_not_start_is_left_out(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times of the others are measured; plain decoding that fails is an error."""
    start = vllm._start

    def failing(key: EngineKey) -> WorkerClient:
        if key.draft == MODEL:
            raise EngineError("the draft has another vocabulary")
        return start(key)

    monkeypatch.setattr(vllm._pool, "_start", failing)
    assert set(vllm.time_steps(WORKLOAD, 48, 2)) == {TARGET.run_digest, NGRAM.digest, NATIVE.digest}
    monkeypatch.setenv("FAKE_VLLM", "error:start")
    vllm.close()
    with pytest.raises(EngineError):
        vllm.time_steps(WORKLOAD, 48, 2)


def test_a_gpu_that_only_vllm_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment is that of vLLM's own device, whatever the torch of this Python was built for."""
    gpu = {"device": "NVIDIA H100", "device_count": 2, "memory_bytes": 85 * 10**9}
    gpu |= {"compute_capability": "9.0", "cuda": "13.0"}
    monkeypatch.setenv("FAKE_VLLM_DEVICE", json.dumps({"kind": "cuda", "uuid": "GPU-none", "environment": gpu}))
    monkeypatch.setenv("FAKE_VLLM_VERSION", "0.32.0")
    with VllmEngine(TARGET, (MODEL,), replace(OPTIONS, log_folder=tmp_path)) as engine:
        found = engine.environment
        assert (found.device, found.device_count, found.compute_capability) == ("NVIDIA H100", 2, "9.0")
        assert (found.memory_bytes, found.cuda, found.torch) == (79 * 2**30, "13.0", "2.13.0+cpu")
        options = json.loads(found.engine_options or "")
        assert (options["eager"], options["async_scheduling"], options["runner"]) == (False, False, 1)
        assert engine.capabilities.origin == "vllm 0.32.0 cuda float32"
        assert len(engine.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")) == 4


def test_engines_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each has the target's weights, so one is alive at a time, and it is timed in one go."""
    monkeypatch.setenv("FAKE_VLLM", "fixed")
    monkeypatch.setenv("FAKE_VLLM_DEVICE", '{"kind": "cuda"}')
    with VllmEngine(TARGET, (MODEL,), replace(OPTIONS, log_folder=tmp_path)) as engine:
        assert set(engine.time_steps(WORKLOAD, 48, 3)[MODEL.digest].samples_s) == {2, 3, 4}
        assert engine.num_starts <= 7  # plain and one for each length, and what warms up and finds out before


@pytest.mark.parametrize(("fault", "lengths", "starts"), [("", (1, 2, 5), 1), ("fixed", (1, 2), 3)])
def test_length_changes_in_place(
    vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch, fault: str, lengths: tuple[int, ...], starts: int
) -> None:
    """One engine serves every length of a draft; where it is fixed each has its own: the first finds out."""
    monkeypatch.setenv("FAKE_VLLM", fault)
    for length in lengths:
        [sample, _] = vllm.run_together(WORKLOAD, PROMPTS, (Setup(draft=MODEL, length=length),), "test 0")
        assert dict(sample.rounds) == {(length, 1): 4}
    assert vllm.num_starts == starts


def test_few_engines_are_kept(tmp_path: Path) -> None:
    """The one not asked for the longest makes room."""
    with VllmEngine(TARGET, (MODEL,), replace(OPTIONS, log_folder=tmp_path, max_alive=1)) as engine:
        engine.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")
        assert len([pid for pid in engine.pids if "fake" in "".join(psutil.Process(pid).cmdline())]) <= 2
        assert engine.num_starts == 2
    assert_gone(engine)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("error:start", EngineError, "the draft has another vocabulary than the target"),
        ("memory:start", OutOfMemoryError, "no more"),
        ("full:start", OutOfMemoryError, "less than desired GPU memory"),
        ("death:start", EngineError, "the engine core died"),
        ("error:use", EngineError, "another vocabulary"),
        ("death:run", EngineError, "the engine core died"),
        ("garbage:run", EngineError, "Loading weights: 100%"),
        ("hang:run", EngineError, "within 2 s"),
        ("memory:run", OutOfMemoryError, "no more"),
        ("parts", EngineError, "diverged from plain decoding at token 3"),
        ("ignored", EngineError, "k=3 and proposes up to 8 tokens a round: it ignores the setting"),
    ],
)
def test_faults_are_one_line_and_the_next_call_works(
    vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[EngineError], words: str
) -> None:
    """Whatever the worker does, the error names it in one line, and asked again the engine is started anew."""
    monkeypatch.setenv("FAKE_VLLM", fault)
    with pytest.raises(kind) as raised:
        vllm.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    monkeypatch.delenv("FAKE_VLLM")
    vllm.close()
    assert len(vllm.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")) == 4


def test_a_killed_engine_is_started_anew(vllm: VllmEngine) -> None:
    """A worker killed between questions is not noticed by who asks."""
    vllm.run_together(WORKLOAD, PROMPTS, (PLAIN,), "test 0")
    psutil.Process(max(vllm.pids)).kill()
    psutil.wait_procs([psutil.Process(pid) for pid in vllm.pids], timeout=10)
    assert vllm.pids == ()
    assert len(vllm.run_together(WORKLOAD, PROMPTS, (PLAIN,), "test 0")) == 2
    assert vllm.num_starts == 2


def test_numbers_that_are_none(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities that are not finite are no trace."""
    monkeypatch.setenv("FAKE_VLLM", "nan")
    with pytest.raises(BadNumbersError, match="not finite"):
        vllm.trace_target(WORKLOAD, PROMPTS[0])


def test_a_python_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message says how to name another."""
    monkeypatch.setenv("FAKE_VLLM", "none")
    with pytest.raises(InputError, match=r"has no vLLM.*DRAFTPICK_VLLM_PYTHON"):
        VllmEngine(TARGET, (), replace(OPTIONS, log_folder=tmp_path))
    with pytest.raises(InputError, match="no such program"):
        VllmEngine(TARGET, (), replace(OPTIONS, log_folder=tmp_path, python=str(tmp_path / "python")))


@pytest.mark.parametrize(
    ("workload", "setup", "words"),
    [
        (replace(WORKLOAD, batch_size=5), PLAIN, "batch size 5: this engine was started for up to 4"),
        (WORKLOAD, Setup(draft=MODEL, length=9), "speculation length 9: this engine was started for up to 8"),
        (WORKLOAD, Setup(draft=MODEL, length=2, stop_below=0.5), "leave stop_below out"),
        (WORKLOAD, Setup(draft=Draft(kind="ngram", max_match=7, min_match=7), length=2), "not one of this engine's"),
        (replace(WORKLOAD, temperature=0.7), K3, "temperature 0.7 with a draft: vllm 0.32.0"),
        (replace(WORKLOAD, context_length=10), PLAIN, "10 together"),
        (replace(WORKLOAD, context_length=510), K3, "512 positions"),
    ],
)
def test_what_cannot_be_run_is_refused(vllm: VllmEngine, workload: Workload, setup: Setup, words: str) -> None:
    """In words that name the value and what is allowed, before anything is started."""
    with pytest.raises(InputError, match=words):
        vllm.run_together(workload, PROMPTS, (setup,), "test 0")
    assert vllm.num_starts == 0


@pytest.mark.parametrize(
    ("version", "device", "is_refused"),
    [
        ("0.24.0+cpu", "cpu", True),
        ("0.32.0", "cpu", True),  # as the package vllm-cpu calls itself
        ("0.33.0+cpu", "cpu", True),
        ("0.34.0+cpu", "cpu", False),
        ("dev", "cpu", False),
        ("0.32.0", "cuda", False),
        ("0.32.0+cu130", "cuda", False),
    ],
)
def test_sampling_is_refused_by_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, device: str, is_refused: bool
) -> None:
    """CPU builds as far as their kernel was read; plain sampling always goes."""
    monkeypatch.setenv("FAKE_VLLM_VERSION", version)
    monkeypatch.setenv("FAKE_VLLM_DEVICE", json.dumps({"kind": device}))
    with VllmEngine(TARGET, (MODEL,), replace(OPTIONS, log_folder=tmp_path)) as engine:
        sampled = replace(WORKLOAD, temperature=0.7)
        assert (engine.capabilities.objection(sampled, drafting=True) is not None) == is_refused
        assert engine.capabilities.objection(sampled, drafting=False) is None


def test_sampling_is_compared_before_it_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once for each draft and law, where the version is not refused; a draft that writes another text is an error."""
    monkeypatch.setenv("FAKE_VLLM_VERSION", "0.34.0+cpu")
    sampled = replace(WORKLOAD, temperature=0.7)
    compared = []
    with VllmEngine(TARGET, (MODEL,), replace(OPTIONS, log_folder=tmp_path)) as engine:
        compare = engine.check_sampling
        monkeypatch.setattr(engine, "check_sampling", lambda *asked: (compared.append(asked), compare(*asked)))
        for length in (2, 3):
            engine.run_together(sampled, PROMPTS, (PLAIN, Setup(draft=MODEL, length=length)), "test 0")
        assert len(compared) == 1
        monkeypatch.setattr(
            engine, "_mean_log_probs", lambda _, __, setup: [-2.0, -2.1] if setup.draft else [-4.0, -4.1]
        )
        engine.run_together(sampled, PROMPTS, (K3,), "test 0")
        with pytest.raises(EngineError, match="writes another text"):
            engine.run_together(replace(sampled, seed=1), PROMPTS, (K3,), "test 0")


def test_16_bit_texts_are_compared_with_plain_decoding_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may diverge, but not be less likely to the target; a refusal says how many diverge, with and without."""
    target = replace(TARGET, dtype="bfloat16")
    monkeypatch.setenv("FAKE_VLLM", "parts")
    with VllmEngine(target, (MODEL, NGRAM), replace(OPTIONS, log_folder=tmp_path)) as engine:
        assert len(engine.run_together(WORKLOAD, PROMPTS, (PLAIN, K3), "test 0")) == 4
        scores = iter([-2.0, -2.1, -4.0, -4.1])
        monkeypatch.setattr(engine, "_mean_score", lambda *_: next(scores))
        with pytest.raises(EngineError, match=r"in bfloat16 \(100% of texts diverge, 0% of plain ones in a batch\)"):
            engine.run_together(WORKLOAD, PROMPTS, (PLAIN, Setup(draft=NGRAM, length=2)), "test 0")


def test_a_native_draft_is_started_as_it_is_spelled(tmp_path: Path) -> None:
    """Method and options go to vLLM as they are; a word that is no option is refused, and so is a GGUF file."""
    key = EngineKey(model=TARGET.name, draft=NATIVE, length=3)
    arguments = start_arguments(key, "float32", 128, OPTIONS, on_cpu=False)
    assert (arguments["options"]["async_scheduling"], arguments["options"]["gpu_memory_utilization"]) == (False, 0.9)
    speculative = arguments["speculative"]
    assert speculative.pop("model").endswith("draft-general")
    assert speculative == {"method": "eagle3", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1}
    for batch_size, captured in ((128, None), (256, 1024)):
        started = start_arguments(key, "float32", 128, replace(OPTIONS, max_batch_size=batch_size), on_cpu=False)
        assert started["options"].get("max_cudagraph_capture_size") == captured
    wrong = replace(key, draft=replace(NATIVE, method="eagle3,fast"))
    with pytest.raises(InputError, match="'eagle3,fast'"):
        start_arguments(wrong, "float32", 128, OPTIONS, on_cpu=False)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        start_arguments(EngineKey(model=str(file)), "float32", 128, OPTIONS, on_cpu=True)


def test_means_that_disagree_are_refused() -> None:
    """Beyond what chance makes of the paired difference, which of a few texts is much."""
    plain = [-4.0, -3.9, -4.2, -4.1]
    check_means("draft", [-4.1, -3.8, -4.3, -4.0], plain)
    with pytest.raises(EngineError, match=r"mean log-probability -2.30 against -4.05"):
        check_means("draft", [-2.3, -2.2, -2.4, -2.3], plain)
    check_means("draft", [-1.0, -1.2, -0.7], [-2.0, -2.4, -1.4])
    with pytest.raises(InputError, match="over 1 texts"):
        check_means("draft", [-2.3], [-2.3])
