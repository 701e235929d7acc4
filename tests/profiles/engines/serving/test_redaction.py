"""Secrets in command lines and URLs are hidden, and servers get a clean environment."""

import os
from pathlib import Path

import pytest

from profiles.engines.openai.launch import Launch
from profiles.engines.serving.process import Process, RunningServer
from profiles.engines.serving.redaction import keyed_variables, redacted, removed_variables, server_environment
from profiles.records.core import digest_of
from profiles.records.errors import EngineError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HF_TOKEN=hf_a serve --port {port}", "HF_TOKEN=*** serve --port {port}"),
        ("serve --api-key sk-secret1 {speculative}", "serve --api-key *** {speculative}"),
        ("serve --api-key=abc --host x", "serve --api-key=*** --host x"),
        ("DB_PASSWORD='a b' serve", "DB_PASSWORD=*** serve"),
        ("""serve --config '{"api_key": "abc", "k": 1}'""", """serve --config '{"api_key": ***, "k": 1}'"""),
        ("curl -H 'Authorization: Bearer abc'", "curl -H 'Authorization: Bearer ***'"),
        ("http://user:secret@host:8000/v1", "http://***@host:8000/v1"),
        ("error near hf_abcdefghij", "error near ***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    """In variables, flags, JSON, headers, URLs, and by the form of a token."""
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve m --max-num-batched-tokens 512 --tokenizer t --port {port} {speculative}",
        "MAX_TOKENS=5 serve --ssl-keyfile /etc/key.pem",
        """serve --speculative-config '{"num_speculative_tokens": 3}'""",
        "http://localhost:8000",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """So that templates without secrets keep their digest."""
    assert redacted(text) == text


def test_a_rotated_key_is_the_same_launch(tmp_path: Path) -> None:
    """Evidence stays found under another key; without a secret the digest is the template's own."""
    first, second = (
        Launch(kind="vllm", log_folder=tmp_path, template=f"serve --port {{port}} --api-key {key}")
        for key in ("sk-old", "sk-new")
    )
    assert first.digest == second.digest
    plain = Launch(kind="vllm", log_folder=tmp_path, template="serve --port {port}")
    assert plain.digest == digest_of("serve --port {port}")[:12]


def test_a_url_is_shown_without_its_password(tmp_path: Path) -> None:
    """In the error of a server that does not answer."""
    with pytest.raises(EngineError) as raised:
        RunningServer("http://user:secret@127.0.0.1:9").wait_ready(1.0)
    assert "secret" not in str(raised.value)
    assert "http://***@127.0.0.1:9" in str(raised.value)


VARIABLES = {
    "PATH": "/bin",
    "HF_TOKEN": "hf_x",
    "LLAMA_ARG_UBATCH": "1",
    "VLLM_API_KEY": "k",
    "OPENAI_API_KEY": "k",
    "VLLM_USE_PRECOMPILED": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "OMP_NUM_THREADS": "2",
}


def test_servers_get_a_clean_environment() -> None:
    """Settings of engines and keys for clients are removed; the Hugging Face token and what times depend on stay."""
    removed = ["LLAMA_ARG_UBATCH", "OPENAI_API_KEY", "VLLM_API_KEY", "VLLM_USE_PRECOMPILED"]
    assert removed_variables(VARIABLES) == removed
    assert server_environment(VARIABLES) == {name: VARIABLES[name] for name in VARIABLES if name not in removed}
    assert keyed_variables(VARIABLES) == {"VLLM_CPU_KVCACHE_SPACE": "4", "OMP_NUM_THREADS": "2"}


def test_a_process_is_started_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch template sets itself is passed on."""
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "1")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with Process(["env"], tmp_path / "log", environment={"VLLM_API_KEY": "template"}) as process:
        assert process.wait(20.0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert "VLLM_API_KEY=template" in lines
    assert not any(line.startswith("LLAMA_ARG_") for line in lines)
    assert f"PATH={os.environ['PATH']}" in lines
