"""A serving engine by its name: drafts that it cannot be told are refused one by one, and the others go on."""

import functools
import sys
from pathlib import Path

import pytest

from profiles.engines.bench import Bench
from profiles.engines.factory import Models, Place, open_bench
from profiles.engines.vllm import engine as vllm_engine
from profiles.engines.vllm.client import Child
from profiles.records import draft_spec
from profiles.records.core import Model, Setup, Workload
from profiles.records.errors import InputError
from tests import ROOT
from tuner import export

LAUNCH = f"{sys.executable} tests/support/fake_server.py --port {{port}} {{speculative}}"
FAKE = functools.partial(Child, worker=ROOT / "tests/support/fake_vllm_worker.py")


def flags_of(kind: str, target: Model, setup: Setup) -> list[str]:
    return export.words(target, setup, Workload(context_length=64, max_new_tokens=8), kind)


def opened(place: Place, target: str | Path, *drafts: str) -> Bench:
    asked = Models(target=str(target), drafts=tuple(draft_spec.parse_draft(text) for text in drafts))
    return open_bench(place, asked, functools.partial(flags_of, place.kind))


def refused(bench: Bench) -> dict[str, str]:
    bench.close()
    return {one.name: one.detail for one in bench.refused}


def test_a_server_of_llama_cpp(tiny_folders: dict[str, Path]) -> None:
    """Short look-ups are dropped: a look-up is kept that drafts at some length, and one that never does is refused."""
    place = Place(engine="server", kind="llamacpp", launch=LAUNCH, min_length=1, max_length=4)
    bench = opened(place, tiny_folders["llama"], "ngram:max=4,min=4", "ngram:max=5,min=5", "ngram", "native:mtp,a=1")
    assert [draft.name for draft in bench.engine.drafts] == ["ngram:max=4,min=4", "native:mtp,a=1"]
    said = refused(bench)
    assert "drops look-up drafts shorter than the match, 5" in said["ngram:max=5,min=5"]
    assert "allowed are equal max and min" in said["ngram:max=4,min=2"]


def test_a_server_of_sglang(tiny_folders: dict[str, Path]) -> None:
    """It is not told of native drafts; where a template has no place for flags nothing can be told."""
    place = Place(engine="server", kind="sglang", launch=LAUNCH)
    said = refused(opened(place, tiny_folders["llama"], "ngram", "native:eagle3"))
    assert list(said) == ["native:eagle3"]
    with pytest.raises(InputError, match=r"\{speculative\} is needed"):
        opened(Place(engine="server", launch="serve {port}"), tiny_folders["llama"], "ngram")


def test_vllm(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no GGUF, and options of a native draft may not take the place of what is measured."""
    monkeypatch.setattr(vllm_engine, "Child", FAKE)
    place, target = Place(engine="vllm", command=sys.executable), tiny_folders["llama"]
    (tmp_path / "draft.gguf").write_bytes(b"GGUF")
    drafts = (str(tmp_path / "draft.gguf"), "ngram", "native:mtp,model=x", "native:mtp,num-speculative-tokens=9")
    said = refused(opened(place, target, *drafts))
    assert len(said) == 3
    assert said["native:mtp,model=x"] == "method 'mtp,model=x': option model is set by draftpick itself"
    with pytest.raises(InputError, match="draft 'early-exit:1': a serving engine drafts with model, ngram, native"):
        opened(place, target, "early-exit:1")


def test_llama_cpp(tiny_folders: dict[str, Path]) -> None:
    """One draft that it does not have leaves the others."""
    pytest.importorskip("xllamacpp", reason="pip install draftpick[llamacpp]")
    drafts = ("ngram:max=3,min=3", "ngram", "native:eagle9", str(tiny_folders["gpt2"]))
    said = refused(opened(Place(engine="llamacpp"), tiny_folders["llama"], *drafts))
    assert list(said) == ["ngram:max=4,min=2", "native:eagle9", str(tiny_folders["gpt2"])]


def test_options_of_a_native_draft() -> None:
    """Measured and emitted alike: underscores for dashes, and numbers for digits."""
    assert draft_spec.engine_options("eagle3,draft-tensor-parallel-size=1,quantization=fp8") == (
        "eagle3",
        {"draft_tensor_parallel_size": 1, "quantization": "fp8"},
    )
