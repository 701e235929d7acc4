"""What llama.cpp needs and says: models as GGUF, how it is started and timed, a request's stream, look-ups, flags."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.builtin import GGUF_MODELS, TARGET
from profiles.engines.llamacpp import engine as llamacpp
from profiles.engines.llamacpp import flags, responses, timing
from profiles.engines.llamacpp.engine import LlamaCppEngine
from profiles.engines.llamacpp.ngram import trace_lookup
from profiles.engines.llamacpp.servers import Options, Program, find_program, weights_of
from profiles.engines.serving.http_load import Answer
from profiles.hardware import fingerprint, software
from profiles.models import loader
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError, ModelError
from profiles.records.evidence import TargetTrace
from tests.support import tiny

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def program() -> Program:
    return find_program()


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(threads=1, log_folder=tmp_path)


def test_builtin_files_are_the_safetensors() -> None:
    """The GGUF files that ship emit what the torch engine emits from the safetensors beside them."""
    for name in GGUF_MODELS:
        loaded = loader.load(name, dtype="float32", device="cpu")
        assert weights_of(loaded.record).float_type == "float32"
        with pytest.raises(ModelError, match="is float32; bfloat16 was given"):
            weights_of(replace(loaded.record, dtype="bfloat16"))


def test_safetensors_need_converting(tiny_folders: dict[str, Path]) -> None:
    """A directory of safetensors is refused with what to do; one that holds a single GGUF file is that file."""
    record = loader.describe(str(tiny_folders["llama"]), dtype="float32").record
    with pytest.raises(ModelError, match=r"reads GGUF files only; convert it with .*convert_hf_to_gguf\.py and give"):
        weights_of(record)


def test_half_floats(program: Program, options: Options, tmp_path: Path) -> None:
    """A 16-bit file is run with llama.cpp's own caches."""
    path = tiny.write_gguf(
        tmp_path / "model.gguf", tiny.write_model(tmp_path / "model"), "BF16", **tiny.LLAMA_CPP_READS
    )
    described = loader.describe(str(path), dtype=None)
    with LlamaCppEngine(described, (), program, options) as engine:
        trace = engine.trace_target(
            Workload(context_length=96, max_new_tokens=8), Prompt(domain="a", token_ids=tuple(range(20, 40)))
        )
    assert len(trace.token_ids) == 8
    assert "bfloat16" in engine.capabilities.origin


def test_a_gpu_that_it_cannot_use(program: Program, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the processor does not pass as one that computes on the GPU; layers go where was asked."""
    target = loader.describe(TARGET, dtype="float32")
    with pytest.raises(InputError, match=r"device 'cuda:0': xllamacpp .* finds no GPU"):
        LlamaCppEngine(target, (), program, replace(options, device="cuda:0"))
    listing = [sys.executable, "-c", "print('Available devices:\\n  CUDA0: NVIDIA H100 (81559 MiB, 80000 MiB free)')"]
    assert software.server_devices(listing) == ["CUDA0"]
    monkeypatch.setattr(llamacpp, "fingerprint", lambda _: fingerprint.fingerprint("cpu"))
    can = replace(program, command=tuple(listing))
    with LlamaCppEngine(target, (), can, replace(options, device="cuda")) as engine:
        assert '"-ngl","99"' in str(engine.environment.engine_options)


def test_threads_belong_to_the_key(program: Program, options: Options) -> None:
    """Times with another number of threads are other evidence."""
    target = loader.describe(TARGET, dtype="float32")
    found = [LlamaCppEngine(target, (), program, replace(options, threads=count)).environment for count in (1, 2)]
    assert len({one.digest for one in found}) == 2
    assert [one.threads for one in found] == [1, 2]
    assert json.loads(found[0].engine_options)["weights"] == "float32"


def test_lengths_are_timed_there_and_back() -> None:
    """Every width has samples of passes in opposite order, so that a machine that slows down favours none."""
    target = loader.describe(TARGET, dtype="float32").record
    look_up = Draft(kind="ngram", max_match=3, min_match=3)
    plan = timing.plan_of(target, [look_up], 3, has_synthetic_rates=True)
    widths: list[int] = []

    def measure(visit: timing.Visit) -> list[float]:
        widths.append(visit.width)
        return [float(len(widths))] * 4

    times = timing.time_plan(plan, timing.Shape(batch_size=1, context_length=64, max_tokens=128), measure)
    assert widths == widths[::-1]
    assert set(times[look_up.digest]) == {1, 2, 3, 4}
    for width, samples_s in times[look_up.digest].items():
        assert len(samples_s) == 4 * 2 * timing.PASSES
        assert sum(samples_s) / len(samples_s) == (len(widths) + 1) / 2, width


def event(
    count: int, milliseconds: float, drafted: int = 0, accepted: int = 0, token: int | None = 7
) -> dict[str, object]:
    """An event of llama.cpp's stream, as far as it is read."""
    timings = {"predicted_n": count, "predicted_ms": milliseconds, "draft_n": drafted, "draft_n_accepted": accepted}
    tokens = [] if token is None else [token]
    return {"tokens": tokens, "tokens_predicted": count, "timings": timings, "stop": False, "stop_type": "limit"}


def read(*events: dict[str, object]) -> responses.LlamaCompletion:
    chunks = tuple((float(place), one) for place, one in enumerate(events))
    return responses.read(Answer(started_s=-1.0, chunks=chunks), "http://here", {})


class TestAnswers:
    """The stream of a request."""

    def test_parts_of_characters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens that were not streamed are requested again; rounds that emitted nothing else are shared out evenly."""
        monkeypatch.setattr(responses, "tokens_again", lambda url, body: [7] * 7)
        run = read(
            event(1, 0.001),
            event(2, 3.0, 4, 1),
            event(3, 3.0, 4, 1),
            event(7, 9.0, 11, 3),  # two rounds of which only the last token was told
            event(7, 9.0, 11, 3, token=None),
        )
        assert run.token_ids == (7,) * 7
        assert dict(run.rounds or {}) == {(4, 1): 2, (3, 1): 1}
        assert run.server_s == pytest.approx(0.009)

    def test_accepted_past_an_end_token(self) -> None:
        """A draft that was right beyond an end token counts what was emitted; another form is an error."""
        run = read(event(1, 0.001), event(2, 3.0, 5, 4), event(3, 3.0, 5, 4))
        assert dict(run.rounds or {}) == {(5, 2): 1}
        with pytest.raises(EngineError, match="another shape than its kind's"):
            read({"choices": []})


def trace_of(prompt: Prompt, tokens: tuple[int, ...]) -> TargetTrace:
    ones = (1.0,) * len(tokens)
    return TargetTrace(prompt_digest=prompt.digest, token_ids=tokens, target_probs=ones, logit_gaps=ones, ended=False)


class TestLookUp:
    """llama.cpp's ngram-simple, along a text."""

    def test_latest_place_and_what_is_too_short(self) -> None:
        """The latest occurrence counts, even where fewer tokens follow it than are needed."""
        draft = Draft(kind="ngram", max_match=2, min_match=2)
        text = (9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 9, 9)
        prompt = Prompt(domain="a", token_ids=text)
        tokens = (1, 2, 3, 9, 1, 2)
        found = trace_lookup(draft, prompt, trace_of(prompt, tokens), 3)
        assert found.proposed == (0, 0, 3, 3, 3, 3)
        assert found.accepted == (0, 0, 2, 1, 0, 1)

    @pytest.mark.parametrize(
        ("prompt", "max_length", "proposed"),
        [((9, 1, 2, 7, 8, 8, 1), 3, 3), ((9, 1, 2, 7, 8, 8, 1), 4, None), ((9, 1, 2, 7, 1), 9, 0)],
    )
    def test_texts_that_are_short(self, prompt: tuple[int, ...], max_length: int, proposed: int | None) -> None:
        """Where all lengths draft, or none does, the trace says so; where only some do there is no one trace."""
        draft = Draft(kind="ngram", max_match=2, min_match=2)
        asked = Prompt(domain="a", token_ids=prompt)
        trace = trace_of(asked, (2, 3))
        if proposed is None:
            with pytest.raises(EngineError, match="lengths up to 3 alone; for lengths up to 4 prompts of 8 tokens"):
                trace_lookup(draft, asked, trace, max_length)
        else:
            assert trace_lookup(draft, asked, trace, max_length).proposed == (0, proposed)

    def test_words_of_a_setup(self) -> None:
        """A method's options become llama.cpp's flags beside its length."""
        words = flags.args_for(Setup(draft=Draft(kind="native", method="ngram-mod,n-match=4"), length=6))
        assert " ".join(words) == (
            "--spec-type ngram-mod --spec-ngram-mod-n-max 6 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-match 4"
        )
