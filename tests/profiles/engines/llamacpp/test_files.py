"""What llama.cpp needs and says: models written as GGUF, the stream of a request, its look-up, its flags."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.engines.llamacpp import flags, gguf_export, responses
from profiles.engines.llamacpp.binary import program_of
from profiles.engines.llamacpp.engine import LlamaCppEngine
from profiles.engines.llamacpp.ngram import trace_lookup
from profiles.engines.llamacpp.servers import Options
from profiles.engines.serving.http_load import Answer
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, ModelError
from profiles.records.evidence import TargetTrace
from tests.support import tiny

pytest.importorskip("xllamacpp")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path) -> Iterator[None]:
    """GGUF files are written anew, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield


class TestGguf:
    """Llamas written as GGUF."""

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"tie_word_embeddings": True, "vocab_size": 320},
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ],
        ids=["grouped", "tied and padded", "scaled rotations"],
    )
    def test_tokens_are_the_same(self, tmp_path: Path, changes: dict[str, object]) -> None:
        """Grouped heads, tied and padded embeddings, Llama 3's rotations: what the torch engine emits."""
        folder = tiny.write_model(tmp_path / "model", **changes)
        loaded = loader.load(str(folder), dtype="float32", device="cpu")
        small = Workload(context_length=128, max_new_tokens=32)
        prompt = Prompt(domain="a", token_ids=tuple(range(20, 60)))
        ours = TorchEngine(loaded, (), "cpu").trace_target(small, prompt)
        with LlamaCppEngine(loaded, (), program_of(), Options(threads=1, log_folder=tmp_path)) as engine:
            theirs = engine.trace_target(replace(small, end_token_ids=loaded.end_token_ids), prompt)
        first = theirs.token_ids if theirs.ended else theirs.token_ids[: len(ours.token_ids)]
        assert first == ours.token_ids[: len(first)]
        told = [(one, other) for one, other in zip(theirs.target_probs, ours.target_probs, strict=False) if one > 0.0]
        assert len(told) > len(first) // 2  # the others are parts of characters
        assert all(one == pytest.approx(other, abs=1e-3) for one, other in told)

    def test_half_floats(self, tmp_path: Path) -> None:
        """A 16-bit file is half the size and is run, with llama.cpp's own caches."""
        folder = tiny.write_model(tmp_path / "model")
        whole, half = (gguf_export.gguf_of(str(folder), dtype) for dtype in ("float32", "bfloat16"))
        assert half.stat().st_size < whole.stat().st_size
        described = loader.describe(str(folder), dtype="bfloat16")
        with LlamaCppEngine(described, (), program_of(), Options(threads=1, log_folder=tmp_path)) as engine:
            trace = engine.trace_target(
                Workload(context_length=96, max_new_tokens=8), Prompt(domain="a", token_ids=tuple(range(20, 40)))
            )
        assert len(trace.token_ids) == 8
        assert "bfloat16" in engine.capabilities.origin

    def test_others_are_refused(self, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
        """Another architecture, other rotations and biases are not written; the converter is named."""
        biased = tiny.write_model(tmp_path / "biased", attention_bias=True)
        linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
        stretched = tiny.write_model(tmp_path / "stretched", **linear)
        for folder, said in ((tiny_folders["qwen2"], "qwen2"), (biased, "biases"), (stretched, "linear rotations")):
            with pytest.raises(ModelError, match=rf"{said}.*convert_hf_to_gguf"):
                gguf_export.gguf_of(str(folder), "float32")

    def test_written_once(self, tmp_path: Path) -> None:
        """A model is written once; with another chat template it is another file; no draft of a file stays."""
        folder = tiny.write_model(tmp_path / "model")
        first = gguf_export.gguf_of(str(folder), "float32")
        written = first.stat().st_mtime_ns
        assert gguf_export.gguf_of(str(folder), "float32") == first
        assert first.stat().st_mtime_ns == written
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        assert gguf_export.gguf_of(str(folder), "float32") != first
        assert not list(first.parent.glob(".*"))
        assert gguf_export.gguf_of(str(first), "float32") == first


def event(
    count: int, milliseconds: float, drafted: int = 0, accepted: int = 0, token: int | None = 7
) -> dict[str, object]:
    """An event of llama.cpp's stream, as far as it is read."""
    timings = {"predicted_n": count, "predicted_ms": milliseconds, "draft_n": drafted, "draft_n_accepted": accepted}
    tokens = [] if token is None else [token]
    return {"tokens": tokens, "tokens_predicted": count, "timings": timings, "stop": False, "stop_type": "limit"}


def read(*events: dict[str, object]) -> responses.Generated:
    chunks = tuple((float(place), one) for place, one in enumerate(events))
    return responses.read(Answer(started_s=-1.0, chunks=chunks), "http://here")


class TestAnswers:
    """The stream of a request."""

    def test_parts_of_characters(self) -> None:
        """Tokens that were not streamed are missing, and rounds that emitted nothing else are shared out evenly."""
        run = read(
            event(1, 0.001),
            event(2, 3.0, 4, 1),
            event(3, 3.0, 4, 1),
            event(7, 9.0, 11, 3),  # two rounds of which only the last token was told
            event(7, 9.0, 11, 3, token=None),
        )
        assert run.token_ids is None
        assert sorted(run.tokens) == [0, 1, 2, 6]
        assert dict(run.rounds) == {(4, 1): 2, (3, 1): 1}
        assert run.decode_s == pytest.approx(0.009)

    def test_accepted_past_an_end_token(self) -> None:
        """A draft that was right beyond an end token counts what was emitted."""
        run = read(event(1, 0.001), event(2, 3.0, 5, 4), event(3, 3.0, 5, 4))
        assert dict(run.rounds) == {(5, 2): 1}

    def test_another_stream(self) -> None:
        """An event of another form is an error that shows it."""
        with pytest.raises(EngineError, match="as no llama-server does"):
            read({"choices": []})


class TestLookUp:
    """llama.cpp's ngram-simple, along a text."""

    def test_latest_place_and_what_is_too_short(self) -> None:
        """The latest occurrence counts, even where fewer tokens follow it than are needed."""
        draft = Draft(kind="ngram", max_match=2, min_match=2)
        text = (9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 9, 9)
        prompt = Prompt(domain="a", token_ids=text)
        tokens = (1, 2, 3, 9, 1, 2)
        trace = TargetTrace(
            prompt_digest=prompt.digest, token_ids=tokens, target_probs=(1.0,) * 6, logit_gaps=(1.0,) * 6, ended=False
        )
        found = trace_lookup(draft, prompt, trace, 3)
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
        trace = TargetTrace(
            prompt_digest=asked.digest, token_ids=(2, 3), target_probs=(1.0,) * 2, logit_gaps=(1.0,) * 2, ended=False
        )
        if proposed is None:
            with pytest.raises(EngineError, match="lengths up to 3 alone; for lengths up to 4 prompts of 8 tokens"):
                trace_lookup(draft, asked, trace, max_length)
        else:
            assert trace_lookup(draft, asked, trace, max_length).proposed == (0, proposed)

    def test_words_of_a_setup(self) -> None:
        """A method's options become llama.cpp's flags beside its length."""
        words = flags.args_for(
            Setup(draft=Draft(kind="native", method="ngram-mod,n-match=4"), length=6), flags.SPELLINGS[-1]
        )
        assert " ".join(words) == (
            "--spec-type ngram-mod --spec-ngram-mod-n-max 6 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-match 4"
        )
