"""Secrets in a launch template, the environment and a URL: none is in any file of a run."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.cli import DECIDED, call, small_run, write_prompts

TEMPLATE = (
    "HF_TOKEN=hf_PLANTEDSECRET MODEL={model} "
    f"{shlex.quote(sys.executable)} tests/support/fake_server.py --port {{port}} --api-key sk-PLANTEDSECRET "
    """--step-s 0.002 --ignored "X-Api-Key: PLANTEDSECRET" '{"api_key": "PLANTEDSECRET"}' """
    "http://me:PLANTED@PLANTEDSECRET@host/?key=PLANTEDSECRET {speculative}"
)


def test_no_secret_is_kept(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store, policy, JSON, report, bundle, look-up, logs and messages."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "PLANTEDSECRET")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    store = tmp_path / "store"
    prompts = write_prompts(tmp_path / "prompts.jsonl", 8)
    words = small_run(tiny_folders["llama"], prompts, "--engine", "server", "--launch", TEMPLATE)
    ran = call(store, *words, "--draft", "ngram:max=3,min=1")
    assert ran.code in DECIDED, ran.stderr
    assert "not passed on to servers: OPENAI_API_KEY, VLLM_API_KEY" in ran.stderr
    outputs = [ran]
    for verb in (("lookup", "--json"), ("explain",), ("report", "--out", str(tmp_path / "page.html"))):
        outputs.append(call(store, *verb))
    packed = tmp_path / "x.draftpick"
    outputs.append(call(store, "bundle", "pack", "--json", str(packed)))
    assert [output.code for output in outputs[1:]] == [0] * 4
    assert json.loads(outputs[-1].stdout)["left_out"] == {}
    assert not [
        path
        for path in (sys.executable, str(tmp_path), str(tiny_folders["llama"]))
        if path.encode() in packed.read_bytes()
    ]
    assert not [text for output in outputs for text in (output.stdout, output.stderr) if "PLANTEDSECRET" in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert store / "evidence.db" in files
    assert not [path for path in files if b"PLANTEDSECRET" in path.read_bytes()]
