"""Whatever a user gets wrong ends in one line on stderr and an exit code, and leaves the evidence as it was.

Here: values of options, prompts and usage. Broken models and stores have modules of their own. Every case runs the
whole command; `{files}` stands for a folder of prompt files.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.cli import assert_refused, call, content, database
from tests.support.fakes import sql
from tests.tuner.cli import test_bad_models as models
from tests.tuner.cli import test_bad_stores as stores

BAD_RUNS = {
    # lengths and contexts; the tiny model has 256 positions
    "--lengths 1-8 --context 250": "context 250 with speculation length 8",
    "--lengths 1-8 --max-new-tokens 250": "max-new-tokens 250 and a prompt",
    "--lengths 0": "lengths '0'",
    "--lengths 1-99": "lengths '1-99'",
    "--lengths 5-2": "lengths '5-2'",
    "--lengths abc": "lengths 'abc'",
    "--lengths ''": "lengths ''",
    "--context 8": "context 8 leaves no tokens for a prompt beside 8 new tokens",
    "--context 0": "context 0 leaves no tokens",
    "--context -5": "context -5 leaves no tokens",
    "--context 100000": "context 100000",
    "--max-new-tokens 1": "max-new-tokens 1: at least 2",
    "--max-new-tokens 100000": "max-new-tokens 100000 and a prompt",
    "--max-new-tokens 255": "allowed are contexts up to 254 with that length\n",
    # numbers and names
    "--batch-size 0": "batch size 0",
    "--batch-size 65": "batch size 65: the torch engine takes 1 to 64 rows at a time",
    "--batch-size 1 --batch-size 400": "batch size 400",
    "--batch-size x": "'--batch-size': 'x' is not a valid int",
    "--temperature -1": "temperature -1",
    "--temperature nan": "temperature nan",
    "--temperature 11": "temperature 11",
    "--top-p 0": "top-p 0",
    "--top-p 2": "top-p 2",
    "--top-p nan": "top-p nan",
    "--top-k -1": "top-k -1",
    "--seed -1": "seed -1",
    "--dtype int8": "'--dtype': 'int8' is not one of 'float32', 'bfloat16', 'float16'",
    "--device tpu": "device 'tpu'",
    "--device cuda:99": "device 'cuda:99'",
    "--objective foo": "'--objective': 'foo' is not one of 'tpot', 'throughput'",
    "--budget 0": "budget 0 seconds",
    "--budget -1": "budget -1 seconds",
    "--budget nan": "budget nan seconds",
    "--max-memory 0": "max-memory 0: a finite number above 0 is needed",
    "--max-memory nan": "max-memory nan",
    "--max-memory inf": "max-memory inf",
    "--max-memory 8GB": "'--max-memory': '8GB' is not a valid float",
    "--max-ttft 0": "max-ttft 0: a finite number above 0 is needed",
    "--max-p95-tpot 0": "max-p95-tpot 0: a finite number above 0 is needed",
    "--max-age 12": "age '12': allowed are whole numbers above 0 with s, m, h or d",
    "--max-age 0h": "age '0h'",
    "--max-age 1.5h": "age '1.5h'",
    "--max-age ''": "age ''",
    "--max-age 99999999999999999999d": "age '99999999999999999999d'",
    # prompts
    "--prompts {files}/missing.jsonl": "missing.jsonl': No such file",
    "--prompts {files}": "a directory; name a file",
    "--prompts ''": "prompts '",
    "--prompts {files}/empty.jsonl": "empty.jsonl': it holds no prompts",
    "--prompts {files}/malformed.jsonl": "malformed.jsonl': 2 of 3 rows cannot be used: line 2: not JSON",
    "--prompts {files}/no-field.jsonl": "no-field.jsonl': 2 of 3 rows cannot be used: line 2: fields 'question'",
    "--prompts {files}/latin-1.jsonl": "latin-1.jsonl' line 2: byte 0xe9 is not UTF-8 text",
    "--prompts {files}/blank.txt": "blank.txt': it holds no prompts",
    "--prompts {files}/mixed.jsonl": "domain 'mixed': that name means all domains together",
    "--prompts {files}/table.csv": "no JSON, and the ending '.csv' is unknown",
    "--prompts builtin:nosuch": "prompts 'builtin:nosuch'",
    "--domain ''": "domain '': a name is needed",
    "--domain ' '": "domain '': a name is needed",
    "--domain mixed": "domain 'mixed': that name means all domains together",
    # a dry run refuses what the run would
    "--dry-run --target {files}/missing": "files/missing': no such directory",
    "--dry-run --draft early-exit:3": "allowed are 1 to 2",
    "--dry-run --prompts {files}/missing.jsonl": "missing.jsonl': No such file",
    # serving engines
    "--engine foo": "'--engine': 'foo' is not one of 'torch', 'vllm', 'llamacpp', 'server'",
    "--engine server": "engine server: --launch COMMAND is needed, with {port} and {speculative} in it",
    "--engine server --launch 'vllm serve {{model}} {{speculative}}'": "{port} is needed, where the server",
    "--engine server --launch 'vllm serve {{port}}'": "{speculative} is needed, where a draft's flags go",
    "--engine server --launch 'vllm {{port}} \"'": "No closing quotation",
    "--engine server --launch '{{port}}' --kind nonsense": "'--kind': 'nonsense' is not one of 'vllm', 'sglang'",
    "--engine server --launch '{{port}}' --kind openai": "'--kind': 'openai' is not one of 'vllm', 'sglang'",
    "--engine server --launch '{{port}} {{speculative}}' --kind sglang --engine-version 0.1": "known: from 0.5.3 on",
    "--engine server --launch '{{port}} {{speculative}}' --engine-version new": "engine version 'new'",
    "--engine server --launch '{{port}}' --threads 2": "threads 2: it is for --engine llamacpp, not server",
    "--engine llamacpp --threads 0": "threads 0: whole numbers from 1 are allowed",
    "--engine llamacpp --launch '{{port}}'": "launch '{port}': it is for --engine server, not llamacpp",
    "--engine llamacpp --engine-command {files}/binary": "its flags are not known; b9294 or newer is needed",
    "--engine llamacpp --engine-command {files}/missing": "it cannot be run, or does not report its version",
    "--engine-command vllm": "engine-command 'vllm': it is for --engine vllm or llamacpp, not torch",
    "--kind vllm": "kind 'vllm': it is for --engine server, not torch",
    "--engine-version 0.33.0": "engine-version '0.33.0': it is for --engine server, not torch",
    # usage
    "--url http://h:x": "No such option: --url",
    "--foo": "No such option: --foo",
    "surplus": "surplus",
    "--target": "'--target' requires an argument",
}
BAD_STDIN = {
    b"": "prompts from standard input: it holds no prompts",
    b" \n\n": "prompts from standard input: it holds no prompts",
    b'{"prompt": "fine"}\n{"prompt": \n{"prompt": \n': "2 of 3 rows cannot be used: line 2: not JSON",
    b'{"question": "what?"}\n': "1 of 1 rows cannot be used: line 1: fields 'question'",
    b'{"prompt": ""}\n': "1 of 1 rows cannot be used: line 1: field 'prompt': an empty prompt",
    b'{"prompt": 7}\n': "1 of 1 rows cannot be used: line 1: field 'prompt': 7 is not text",
    b"\x89PNG\r\n\x1a\n\x00\x00": "prompts from standard input line 1: byte 0x89 is not UTF-8 text",
}
BAD_OTHERS = {
    "frobnicate": (2, "frobnicate"),
    "show --foo": (2, "--foo"),
    "lookup --foo": (2, "--foo"),
    "lookup --target nosuch": (3, "target 'nosuch'"),
    "lookup --format foo": (
        2,
        "'--format': 'foo' is not one of 'vllm', 'sglang', 'trtllm', 'llamacpp', 'transformers'",
    ),
    "lookup --engine foo": (2, "'--engine': 'foo' is not one of 'torch', 'vllm', 'llamacpp', 'sglang'"),
    "lookup --policy nosuch.json": (2, "policy file nosuch.json cannot be read: No such file"),
    "lookup --policy nosuch.json --store here": (2, "policy nosuch.json: --store names another source"),
    "lookup --format vllm --engine-version new": (2, "engine version 'new'"),
    "lookup --adaptive": (2, "--adaptive: name the engine with --format"),
    "lookup --require best": (2, "'--require': 'best' is not one of 'exact', 'version'"),
    "lookup --environment nosuch.json": (2, "environment nosuch.json cannot be read"),
    "lookup --device tpu": (2, "device 'tpu': allowed are cpu and cuda"),
    "lookup --format foo --json": (2, "'--format': 'foo'"),
    "lookup --batch-size 0": (2, "batch size 0"),
    "lookup --context 0": (2, "context 0"),
    "lookup --temperature nan": (2, "temperature nan"),
    "lookup --temperature hot": (2, "'--temperature': 'hot' is not a valid float"),
    "search --engine vllm": (2, "engine vllm or a limit without --space: forecasts are torch's and have none"),
    "search --max-memory 8": (2, "engine torch or a limit without --space"),
    "check --target {llama} --foo": (2, "--foo"),
    "check --target {llama} --batch-size 0": (2, "batch size 0"),
    "check --target {llama} --batch-size x": (2, "'--batch-size': 'x' is not a valid int"),
    "check --target {llama} --context 0": (2, "context 0"),
    "check --target {llama} --context 100000": (2, "context 100000: model"),
    "check --target {llama} --dtype int8": (2, "'--dtype': 'int8'"),
    "check --target {llama} --device tpu": (2, "device 'tpu'"),
    "check --target {llama} --draft ''": (2, "draft ''"),
    "check --target {llama} --draft ngram:foo=1": (2, "'foo=1' is not one of max=N and min=N"),
    "check --target {llama} --draft early-exit:x": (2, "'x' is not a whole number"),
    "check --target {llama} --prompts {files}/missing.jsonl": (2, "missing.jsonl': No such file"),
    "check --target {llama} --prompts {files}/malformed.jsonl": (2, "rows cannot be used: line 2: not JSON"),
    "check --target {llama} --prompts -": (2, "prompts from standard input: it holds no prompts"),
    "verify": (2, "'--launch'"),
    "verify --launch '{{port}}' --format json": (2, "'--format': 'json' is not one of 'vllm', 'sglang', 'llamacpp'"),
    "verify --launch '{{port}}' --format transformers": (2, "'--format': 'transformers' is not one of 'vllm'"),
    "verify --launch '{{port}}' --format trtllm": (2, "'--format': 'trtllm' is not one of 'vllm'"),
    "verify --launch '{{port}}'": (
        3,
        "there is nothing to start: nothing to set for vLLM: plain decoding is the choice",
    ),
    "verify --launch '{{port}}' --engine-version new --batch-size 0": (2, "batch size 0"),
    "explain --foo": (2, "--foo"),
    "explain --target nosuch": (3, "target 'nosuch'"),
    "explain --instead nosuch": (2, "setup 'nosuch' is no candidate for domain 'mixed'; allowed are "),
    "explain --instead ''": (2, "setup '' is no candidate"),
    "explain --domain nosuch --instead nosuch": (2, "setup 'nosuch'"),
    "explain --temperature 0.7": (3, "temperature 0.7 was not measured"),
    "explain --temperature nan": (2, "temperature nan"),
    "explain --batch-size 64": (3, "batch size 64 is beyond the largest measured, 1"),
    "explain --batch-size 0": (2, "batch size 0"),
    "explain --context 100000": (3, "context 100000 is beyond the longest measured"),
    "explain --context 0": (2, "context 0"),
    "report": (2, "'--out'"),
    "report --out {files}/chart.pdf": (2, "chart.pdf: it is a page, the suffixes .html, .htm are allowed"),
    "report --out {files}/chart": (2, "files/chart: it is a page, the suffixes"),
    "report --out {files}/missing/page.html": (2, "missing/page.html cannot be written: No such file or directory"),
    "report --out {files}/folder.html": (2, "folder.html cannot be written: Is a directory"),
    "report --out {files}/table.csv/page.html": (2, "page.html cannot be written: Not a directory"),
    "report --out {files}/page.html --target nosuch": (3, "target 'nosuch'"),
}
PROMPT_FILES = {
    "empty.jsonl": b"",
    "malformed.jsonl": b'{"prompt": "fine"}\n{"prompt": \n{"prompt": \n',
    "no-field.jsonl": b'{"prompt": "fine"}\n{"question": "what?"}\n{"question": "why?"}\n',
    "latin-1.jsonl": b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n{"prompt": "th\xe9"}\n',
    "blank.txt": b"\n---\n\n",
    "mixed.jsonl": b'{"prompt": "fine"}\n{"prompt": "good", "domain": "mixed"}\n',
    "table.csv": b"prompt\nfine\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt files broken in the way their name says, and a folder where a report's file should go."""
    folder = tmp_path_factory.mktemp("bad") / "files"
    (folder / "folder.html").mkdir(parents=True)
    for name, written in PROMPT_FILES.items():
        (folder / name).write_bytes(written)
    program = folder / "binary"  # says what no text is
    program.write_bytes(b"#!/bin/sh\nprintf 'version: \\377\\n'\n")
    program.chmod(0o755)
    return folder


def test_there_are_many_kinds() -> None:
    """At least 120 different things that a user can get wrong are tried."""
    here = len(BAD_RUNS) + len(BAD_STDIN) + len(BAD_OTHERS)
    assert here + len(models.BAD_TARGETS) + len(models.BAD_DRAFTS) + len(stores.BAD_STORES) >= 120


@pytest.mark.parametrize("flags", BAD_RUNS)
def test_a_run_is_refused(flags: str, files: Path, sound_store: Path, sound_words: list[str]) -> None:
    """A sound run with one thing wrong says so before anything is measured."""
    before = content(sound_store)
    said = call(sound_store, *sound_words, *shlex.split(flags.format(files=files)))
    assert_refused(said, 2, BAD_RUNS[flags])
    assert content(sound_store) == before


@pytest.mark.parametrize("words", [["--lengths", "0"], ["--prompts", "missing.jsonl"], ["--num-prompts", "0"]])
def test_a_run_with_a_typing_error_makes_no_store(words: list[str], tmp_path: Path) -> None:
    """Options and prompts are read before a store is made, the machine's load is watched and a model is loaded."""
    assert call(tmp_path / "store", "run", *words).code == 2
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(sound_store: Path, sound_words: list[str]) -> None:
    """`--device cuda` names what there is instead."""
    said = call(sound_store, *sound_words, "--device", "cuda")
    assert_refused(said, 2, "device 'cuda': 0 GPUs found; allowed are auto, cpu")


@pytest.mark.parametrize("piped", BAD_STDIN)
def test_standard_input_is_refused(piped: bytes, sound_store: Path, sound_words: list[str]) -> None:
    """Prompts that are piped in are told from a file's, and their lines counted as well."""
    before = content(sound_store)
    assert_refused(call(sound_store, *sound_words, "--prompts", "-", stdin=piped), 2, BAD_STDIN[piped])
    assert content(sound_store) == before


@pytest.mark.parametrize("words", BAD_OTHERS)
def test_another_command_is_refused(words: str, files: Path, tiny_folders: dict[str, Path], sound_store: Path) -> None:
    """The commands beside `run` refuse what they cannot answer."""
    before = content(sound_store)
    code, wanted = BAD_OTHERS[words]
    said = call(sound_store, *shlex.split(words.format(files=files, llama=tiny_folders["llama"])))
    assert_refused(said, code, wanted)
    assert content(sound_store) == before


def test_without_a_command_the_help_is_shown(tmp_path: Path) -> None:
    """`tune.py` alone is a question, not a mistake."""
    said = call(tmp_path)
    assert said.code == 0
    assert re.search(r"run +Measure every draft", said.stdout)
    assert said.stderr == ""


def test_names_are_never_read_as_markup(sound_store: Path, tmp_path: Path) -> None:
    """Brackets in the names of a store and of a target are shown as they are."""
    folder = tmp_path / "[bold]"
    shutil.copytree(sound_store, folder)
    sql(database(folder), "UPDATE models SET name = 'a[/b]'")
    said = call(folder, "show")
    assert said.code == 0
    assert "a[/b]" in said.stdout
    assert "[bold]" in said.stdout.replace("\n", "")
