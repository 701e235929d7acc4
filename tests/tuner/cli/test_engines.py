"""The command line on serving engines: run, show, look up, explain, report and verify, over engines without a model."""

import functools
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from profiles.engines.vllm import engine as vllm_engine
from profiles.engines.vllm.client import WorkerClient
from profiles.hardware import software
from tests import ROOT
from tests.support.cli import DECIDED, Said, assert_packs, assert_refused, call, small_run, write_prompts
from tests.support.tiny import LLAMA_CPP_READS, write_gguf

TEMPLATE = f"{shlex.quote(sys.executable)} tests/support/fake_server.py --port {{port}} --step-s 0.002 {{speculative}}"
FAKE = functools.partial(WorkerClient, worker=ROOT / "tests/support/fake_vllm_worker.py")
SERVER = ("--engine", "server", "--launch", TEMPLATE)
TWO_DRAFTS = ("--draft", "ngram:max=3,min=1", "--draft", "early-exit:1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A finished run on an engine: its format, its store and what it said."""

    form: str
    store: Path
    said: Said


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 36)


@pytest.fixture(scope="module")
def packed(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as llama.cpp reads it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", tiny_folders["llama"], **LLAMA_CPP_READS)


@pytest.fixture(scope="module", params=["vllm", "server", "llamacpp"])
def ran(
    request: pytest.FixtureRequest,
    tiny_folders: dict[str, Path],
    packed: Path,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    """A run of each engine; of llama.cpp over its real server, which is small."""
    store = tmp_path_factory.mktemp("store")
    words = small_run(tiny_folders["llama"], prompts, "--domain", "one")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "llamacpp":
            pytest.importorskip("xllamacpp", reason="pip install draftpick[llamacpp]")
            words = small_run(packed, prompts, "--domain", "one")
            words = [*words, "--engine", "llamacpp", "--draft", "ngram:max=1,min=1", "--draft", "ngram:max=3,min=1"]
        elif request.param == "vllm":
            patch.setattr(vllm_engine, "WorkerClient", FAKE)
            words = [*words, "--engine", "vllm", "--engine-command", sys.executable, *TWO_DRAFTS]
        else:
            words = [*words, *SERVER, *TWO_DRAFTS, "--batch-size", "1", "--batch-size", "2"]
        said = call(store, *words)
    return Ran(form="llamacpp" if request.param == "llamacpp" else "vllm", store=store, said=said)


def test_a_run_leaves_out_what_the_engine_does_not_have(ran: Ran) -> None:
    """The look-up is measured although the other draft cannot be told."""
    assert ran.said.code in DECIDED, ran.said.stderr
    assert "left out: " in ran.said.stderr
    assert ran.said.document["environment"]["engine"] == ran.form
    assert len(ran.said.not_measured) == 1


def test_the_verbs_tell(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the machine that ran the match is exact, and every other verb has an answer too."""
    measured = ran.said.document["environment"]["engine_version"]
    if ran.form == "vllm":
        monkeypatch.setattr("profiles.hardware.machine.installed_version", lambda _: measured)
        monkeypatch.setattr(software, "installed_version", lambda _: "0.33.0")
    found = call(ran.store, "lookup", "--format", ran.form, "--require", "exact", "--json")
    assert (found.code, found.document["answer"]["match"]["level"]) == (0, "exact"), found.stderr
    text = call(ran.store, "lookup", "--format", ran.form)
    assert (text.code, "warning" in text.stderr) == (0, False)
    assert measured in json.dumps(found.document)
    explained = call(ran.store, "explain")
    assert explained.code == 0, explained.stderr
    assert "Plain decoding (k = 0) takes" in explained.stdout
    assert call(ran.store, "show").code == 0
    assert call(ran.store, "report", "--out", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert_packs(ran.store, tmp_path)


def test_the_emitted_command_is_verified(ran: Ran, prompts: Path) -> None:
    """What the fake servers' store emits is started beside a plain one; plain decoding leaves nothing to start."""
    words = ["verify", "--format", ran.form, "--launch", TEMPLATE, "--prompts", prompts, "--max-new-tokens", "8"]
    said = call(ran.store, *words)
    if ran.said.document["proven"]:
        assert said.code in DECIDED, said.stderr
        assert said.document["emitted"].startswith("--speculative-config")
        measured = [one["concurrency"] for one in said.document["concurrencies"]]
        assert sorted([*measured, *said.document["not_covered"]]) == [1, 2]
    else:
        assert_refused(said, 3, "nothing to start")


def test_a_dry_run_runs_at_a_length_that_drafts(packed: Path, prompts: Path, tmp_path: Path) -> None:
    """A look-up of three tokens drafts nothing at the middle of 1 to 3, two."""
    pytest.importorskip("xllamacpp", reason="pip install draftpick[llamacpp]")
    words = small_run(packed, prompts, "--lengths", "1-3", "--engine", "llamacpp", "--dry-run")
    said = call(tmp_path, *words, "--draft", "ngram:max=3,min=3")
    assert said.code == 0, said.stderr


def test_sampling_that_is_wrong_is_refused_at_once(
    tiny_folders: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On vLLM's CPU builds: the target alone could be sampled, but it needs no tuning."""
    monkeypatch.setattr(vllm_engine, "WorkerClient", FAKE)
    words = small_run(tiny_folders["llama"], prompts, "--engine", "vllm", "--temperature", "0.7", *TWO_DRAFTS)
    assert_refused(call(tmp_path, *words), 2, "temperature 0.7 with a draft: vllm 0.32.0+cpu draws")
