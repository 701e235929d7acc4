"""Secrets in command lines and URLs are hidden, and servers get a clean environment."""

import os
import time
from pathlib import Path

import pytest

from profiles.engines.openai.launch import Launch
from profiles.engines.serving.process import Process
from profiles.engines.serving.redaction import keyed_variables, redacted, removed_variables, server_environment
from profiles.records.core import digest_of

NO_SECRETS = (
    "vllm serve m --max-num-batched-tokens 512 --tokenizer t --port {port} {speculative}",
    "MAX_TOKENS=5 serve --ssl-keyfile /etc/key.pem",
    """serve --speculative-config '{"num_speculative_tokens": 3}'""",
    "http://localhost:8000",
    "http://host/v1?x=a@b",
    "time to first token: 5.1 ms; x-axis: k",
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HF_TOKEN=hf_a serve --port {port}", "HF_TOKEN=*** serve --port {port}"),
        ("serve --api-key sk-secret1 {speculative}", "serve --api-key *** {speculative}"),
        ("serve --api-key=abc --host x", "serve --api-key=*** --host x"),
        ("DB_PASSWORD='a b' serve", "DB_PASSWORD=*** serve"),
        ("""serve --config '{"api_key": "abc", "k": 1}'""", """serve --config '{"api_key": ***, "k": 1}'"""),
        ("curl -H 'Authorization: Bearer abc'", "curl -H 'Authorization: Bearer ***'"),
        ("curl -H 'Authorization: Basic dXM6cHc='", "curl -H 'Authorization: ***'"),
        ("""serve --header "X-API-Key: a b" --port 1""", """serve --header "X-API-Key: ***" --port 1"""),
        ('{"template": "serve {\\"api_key\\": \\"abc\\"}"}', '{"template": "serve {\\"api_key\\": \\***}"}'),
        ("Namespace(api_key=['abc'], port=1)", "Namespace(api_key=[***], port=1)"),
        ("{'api_key': ['abc'], 'port': 1}", "{'api_key': [***], 'port': 1}"),
        ("http://user:secret@host:8000/v1", "http://***@host:8000/v1"),
        ("http://user:p@ss@host/v1?x=a@b", "http://***@host/v1?x=a@b"),
        ("http://host/v1?a=1&key=abc&sig=d", "http://host/v1?a=1&key=***&sig=***"),
        ("error near hf_abcdefghij", "error near ***"),
        *((text, text) for text in NO_SECRETS),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    """In variables, flags, JSON, headers, URLs, and by the form of a token; a template without any keeps its digest."""
    assert redacted(text) == shown


def test_long_lines_take_no_time() -> None:
    """A log may be one line of dashes, and a stranger's bundle too."""
    started = time.process_time()
    for text in ("-" * 60_000, "a" * 60_000, "api_key" * 9000, "://" * 20_000, "x-" * 30_000, "x-" + "key" * 20_000):
        redacted(text)
    assert time.process_time() - started < 2.0


def test_a_rotated_key_is_the_same_launch(tmp_path: Path) -> None:
    """Evidence stays found under another key; without a secret the digest is the template's own."""
    first, second = (
        Launch(kind="vllm", log_folder=tmp_path, template=f"serve --port {{port}} --api-key {key}")
        for key in ("sk-old", "sk-new")
    )
    assert first.digest == second.digest
    plain = Launch(kind="vllm", log_folder=tmp_path, template="serve --port {port}")
    assert plain.digest == digest_of("serve --port {port}")[:12]


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
    assert "VLLM_API_KEY=***" in (tmp_path / "log").read_text().splitlines()  # once it has ended
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
    assert not any(line.startswith("LLAMA_ARG_") for line in lines)
    assert f"PATH={os.environ['PATH']}" in lines
