"""A serving engine by its name: drafts that it cannot be told are refused one by one, and the others go on."""

import functools
import sys
from pathlib import Path

import pytest

from profiles.engines.bench import Bench
from profiles.engines.factory import EngineSpec, ModelSpec, default_engine, open_bench
from profiles.engines.vllm import engine as vllm_engine
from profiles.engines.vllm.client import WorkerClient
from profiles.records import draft_spec
from profiles.records.errors import InputError, ModelError
from tests import ROOT
from tests.support.tiny import write_model

LAUNCH = f"{sys.executable} tests/support/fake_server.py --port {{port}} {{speculative}}"
FAKE = functools.partial(WorkerClient, worker=ROOT / "tests/support/fake_vllm_worker.py")


def opened(spec: EngineSpec, target: str | Path, *drafts: str) -> Bench:
    return open_bench(
        spec, ModelSpec(target=str(target), drafts=tuple(draft_spec.parse_draft(text) for text in drafts))
    )


def refused(bench: Bench) -> dict[str, str]:
    bench.close()
    return {draft.name: draft.detail for draft in bench.refused}


def test_a_server_of_llama_cpp() -> None:
    """Short look-ups are dropped: a look-up is kept that drafts at some length, and one that never does is refused."""
    spec = EngineSpec(engine="server", kind="llamacpp", launch=LAUNCH, min_length=1, max_length=4)
    bench = opened(spec, "builtin:target", "ngram:max=4,min=4", "ngram:max=5,min=5", "ngram", "native:mtp,a=1")
    assert [draft.name for draft in bench.engine.drafts] == ["ngram:max=4,min=4", "mtp,a=1"]
    reasons = refused(bench)
    assert "drops look-up drafts shorter than the match, 5" in reasons["ngram:max=5,min=5"]
    assert "allowed are equal max and min" in reasons["ngram:max=4,min=2"]


def test_a_server_of_sglang(tiny_folders: dict[str, Path]) -> None:
    """It is not told of native drafts; where a template has no place for flags nothing can be told."""
    spec = EngineSpec(engine="server", kind="sglang", launch=LAUNCH)
    reasons = refused(opened(spec, tiny_folders["llama"], "ngram", "native:eagle3"))
    assert list(reasons) == ["eagle3"]
    with pytest.raises(InputError, match=r"\{speculative\} is needed"):
        opened(EngineSpec(engine="server", launch="serve {port}"), tiny_folders["llama"], "ngram")


def test_vllm(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no GGUF, and options of a native draft may not take the place of what is measured."""
    monkeypatch.setattr(vllm_engine, "WorkerClient", FAKE)
    spec, target = EngineSpec(engine="vllm", command=sys.executable), tiny_folders["llama"]
    (tmp_path / "draft.gguf").write_bytes(b"GGUF")
    drafts = (str(tmp_path / "draft.gguf"), "ngram", "native:mtp,model=x", "native:mtp,num-speculative-tokens=9")
    reasons = refused(opened(spec, target, *drafts))
    assert len(reasons) == 3
    assert reasons["mtp,model=x"] == "method 'mtp,model=x': option model is set by draftpick itself"
    with pytest.raises(InputError, match="draft 'early-exit:1': a serving engine drafts with model, ngram, native"):
        opened(spec, target, "early-exit:1")


@pytest.mark.parametrize(
    ("gpus", "version", "target", "draft", "device", "engine"),
    [
        (1, "0.32.0", "org/model", "ngram", None, "vllm"),
        (1, "0.32.0", "org/model", "native:mtp", "cuda", "vllm"),
        (0, "0.32.0", "org/model", "ngram", None, "torch"),
        (1, None, "org/model", "ngram", None, "torch"),
        (1, "0.32.0", "org/model", "ngram", "cpu", "torch"),
        (1, "0.32.0", "model.gguf", "ngram", None, "torch"),
        (1, "0.32.0", "org/model", "early-exit:4", None, "torch"),
    ],
)
def test_the_engine_of_record_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    version: str | None,
    target: str,
    draft: str,
    device: str | None,
    engine: str,
) -> None:
    """vLLM where it is installed and reads what is asked, which is said; else draftpick's own loop."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("profiles.hardware.software.installed_version", lambda _: version)
    monkeypatch.delenv("DRAFTPICK_VLLM_PYTHON", raising=False)
    name, reason = default_engine(target, (draft_spec.parse_draft(draft),), device)
    assert (name, "vLLM 0.32.0" in (reason or "")) == (engine, engine == "vllm")


def test_llama_cpp(tiny_folders: dict[str, Path]) -> None:
    """One draft that it does not have leaves the others."""
    pytest.importorskip("xllamacpp", reason="pip install draftpick[llamacpp]")
    drafts = ("ngram:max=3,min=3", "ngram", "native:eagle9", "builtin:draft-code")
    reasons = refused(opened(EngineSpec(engine="llamacpp"), "builtin:target", *drafts))
    assert list(reasons) == ["ngram:max=4,min=2", "native:eagle9", "builtin:draft-code"]
    assert "reads GGUF files only" in reasons["builtin:draft-code"]
    with pytest.raises(ModelError, match="convert_hf_to_gguf"):
        opened(EngineSpec(engine="llamacpp"), tiny_folders["llama"], "ngram:max=3,min=3")


@pytest.mark.parametrize(
    ("text", "alias"),
    [
        ("eagle3:/models/head", "native:eagle3+/models/head"),
        ("eagle,draft-tensor-parallel-size=1:org/head", "native:eagle,draft-tensor-parallel-size=1+org/head"),
        ("mtp", "native:mtp"),
        ("suffix", "native:suffix"),
        ("eagle:builtin:draft-eagle", "builtin:draft-eagle"),
        ("ngram:max=4,min=2+eagle:builtin:draft-eagle", "ngram+builtin:draft-eagle"),
        ("ngram:max=4,min=2+mtp", "ngram + native:mtp"),
        ("native:own+org/head", "native:own + org/head"),
    ],
)
def test_a_method_needs_no_prefix(text: str, alias: str) -> None:
    """vLLM's own are spelled as it spells them, alone or behind a look-up; nothing may be left out behind the colon."""
    assert draft_spec.parse_draft(text) == draft_spec.parse_draft(alias)
    assert draft_spec.parse_draft(alias).name == text
    with pytest.raises(InputError, match="METHOD:MODEL"):
        draft_spec.parse_draft("dflash:")


def test_options_of_a_native_draft() -> None:
    """Measured and emitted alike: underscores for dashes, and numbers for digits."""
    assert draft_spec.engine_options("eagle3,draft-tensor-parallel-size=1,quantization=fp8") == (
        "eagle3",
        {"draft_tensor_parallel_size": 1, "quantization": "fp8"},
    )


def test_a_padded_vocabulary_is_refused_before_vllm_starts_with_it(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter's rule holds where the engine is run too; the look-up goes on."""
    monkeypatch.setattr(vllm_engine, "WorkerClient", FAKE)
    padded = str(write_model(tmp_path / "padded", num_layers=1, vocab_size=320))
    spec = EngineSpec(engine="vllm", command=sys.executable)
    reasons = refused(opened(spec, tiny_folders["llama"], padded, "ngram"))
    assert "needs equal vocabulary sizes, and the target has 300, the draft 320" in reasons[padded]


def test_removed_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a bench."""
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "1")
    bench = opened(EngineSpec(engine="server", kind="llamacpp", launch=LAUNCH), "builtin:target", "ngram:max=4,min=4")
    bench.close()
    assert any("LLAMA_ARG_UBATCH" in note for note in bench.notes)
