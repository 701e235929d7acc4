"""Whatever a user gets wrong ends in one line on stderr and an exit code, and leaves the evidence as it was.

Every case runs the whole command; `{files}` stands for a folder of broken models and prompt files.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.cli import DECIDED, Said, call, database, evidence, small_run, write_prompts
from tests.fakes import sql

BAD_RUNS = {
    # models
    "--target {files}/missing": "files/missing': no such directory",
    "--target {files}/prompts.jsonl": "prompts.jsonl': a file",
    "--target {files}/pickled": "pickled weights (pytorch_model.bin) can run code and are refused",
    "--target {files}/truncated": "files/truncated': SafetensorError",
    "--target {files}/nan": "files/nan': lm_head.weight holds NaN",
    "--target builtin:nosuch": "model 'builtin:nosuch': not one that ships",
    "--draft {files}/missing": "files/missing': no such directory",
    "--draft {files}/nan": "files/nan': lm_head.weight holds NaN",
    "--draft {files}/other-tokens": "have different token maps (300 and 300 tokens)",
    "--draft ''": "draft ''",
    "--draft early-exit:0": "early-exit layers 0: at least 1",
    "--draft early-exit:99": "early-exit:99 of target",
    "--draft early-exit:3": "allowed are 1 to 2",
    "--draft early-exit:x": "'x' is not a whole number",
    "--draft ngram:min=5,max=2": "ngram matches max=2,min=5",
    "--draft ngram:foo=1": "'foo=1' is not one of max=N and min=N",
    # lengths and contexts; the tiny model has 256 positions
    "--lengths 1-8 --context 250": "context 250 with speculation length 8",
    "--lengths 1-8 --max-new-tokens 250": "max-new-tokens 250 and a prompt",
    "--lengths 0": "lengths '0'",
    "--lengths 1-99": "lengths '1-99'",
    "--lengths 5-2": "lengths '5-2'",
    "--lengths abc": "lengths 'abc'",
    "--lengths ''": "lengths ''",
    "--context 8": "context 8 leaves no room for a prompt beside 8 new tokens",
    "--context 0": "context 0 leaves no room",
    "--context 100000": "context 100000",
    "--max-new-tokens 1": "max-new-tokens 1: at least 2",
    "--max-new-tokens 100000": "max-new-tokens 100000 and a prompt",
    "--max-new-tokens 255": "allowed are contexts up to 254 with that length\n",
    # numbers and names
    "--batch-size 0": "batch size 0",
    "--batch-size 4": "batch size 4",
    "--batch-size 1 --batch-size 4": "batch size 1, 4",
    "--batch-size x": "'--batch-size'",
    "--temperature -1": "temperature -1",
    "--temperature nan": "temperature nan",
    "--temperature 11": "temperature 11",
    "--top-p 0": "top-p 0",
    "--top-p 2": "top-p 2",
    "--top-p nan": "top-p nan",
    "--top-k -1": "top-k -1",
    "--seed -1": "seed -1",
    "--dtype int8": "dtype 'int8'",
    "--device tpu": "device 'tpu'",
    "--device cuda:99": "device 'cuda:99'",
    "--objective foo": "objective 'foo'",
    "--budget 0": "budget 0 seconds",
    "--budget -1": "budget -1 seconds",
    "--budget nan": "budget nan seconds",
    # prompts
    "--prompts {files}/missing.jsonl": "missing.jsonl': No such file",
    "--prompts {files}": "a directory; allowed are files",
    "--prompts {files}/empty.jsonl": "empty.jsonl': it holds no prompts",
    "--prompts {files}/malformed.jsonl": "malformed.jsonl' line 2: not JSON",
    "--prompts {files}/no-field.jsonl": "no-field.jsonl' line 2: fields 'question'",
    "--prompts {files}/latin-1.jsonl": "latin-1.jsonl' line 2: byte 0xe9 is not UTF-8",
    "--prompts {files}/table.csv": "ending '.csv' is not known",
    "--prompts builtin:nosuch": "prompts 'builtin:nosuch'",
    # usage
    "--foo": "No such option: --foo",
    "surplus": "surplus",
    "--target": "'--target' requires an argument",
}
BAD_OTHERS = {
    "frobnicate": (2, "frobnicate"),
    "show --foo": (2, "--foo"),
    "lookup --foo": (2, "--foo"),
    "lookup --target nosuch": (3, "target 'nosuch'"),
    "lookup --format foo": (2, "format 'foo': allowed are json, transformers"),
    "lookup --format foo --json": (2, "format 'foo'"),
    "lookup --batch-size 0": (2, "batch size 0"),
    "lookup --context 0": (2, "context 0"),
    "lookup --temperature nan": (2, "temperature nan"),
    "report": (2, "'--out'"),
    "report --out {files}/chart.pdf": (2, "chart.pdf: the suffixes .html, .htm, .png, .svg are allowed"),
    "report --out {files}/chart": (2, "files/chart: the suffixes"),
    "report --out {files}/missing/chart.png": (2, "missing/chart.png cannot be written: No such file or directory"),
    "report --out {files}/chart.png --target nosuch": (3, "target 'nosuch'"),
}
VERBS = ("run", "show", "lookup", "report")
PROMPT_FILES = {
    "empty.jsonl": b"",
    "malformed.jsonl": b'{"prompt": "fine"}\n{"prompt": \n',
    "no-field.jsonl": b'{"prompt": "fine"}\n{"question": "what?"}\n',
    "latin-1.jsonl": b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n',
    "table.csv": b"prompt\nfine\n",
}


@pytest.fixture(scope="module")
def files(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prompt files, all but `prompts.jsonl` broken in the way their name says."""
    folder = tmp_path_factory.mktemp("bad") / "files"
    for name in ("pickled", "truncated", "nan", "other-tokens"):
        shutil.copytree(tiny_folders["llama"], folder / name)
    weights = folder / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = folder / "nan" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][7, 7] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    tiny.tokenizer(tiny.OTHER_TEXT).save_pretrained(folder / "other-tokens")
    write_prompts(folder / "prompts.jsonl", 6)
    for name, content in PROMPT_FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def valid_run(files: Path, tiny_folders: dict[str, Path]) -> list[str]:
    return small_run(tiny_folders["llama"], files / "prompts.jsonl")  # without drafts, ngram is tried


@pytest.fixture(scope="module")
def store(valid_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished run in it; refused commands must not change it."""
    folder = tmp_path_factory.mktemp("store")
    assert call(folder, *valid_run).code in DECIDED
    return folder


def assert_refused(said: Said, code: int, wanted: str) -> None:
    """One line that starts with `error:` and holds `wanted`, nothing on stdout, and the code."""
    assert said.stderr.startswith("error: ")
    assert wanted in said.stderr
    assert said.stderr.count("\n") == 1
    assert said.stderr.endswith("\n")
    assert said.stdout == ""
    assert said.code == code


@pytest.mark.parametrize("flags", BAD_RUNS)
def test_a_run_is_refused(flags: str, files: Path, store: Path, valid_run: list[str]) -> None:
    """A sound run with one thing wrong says so before anything is measured."""
    before = evidence(store)
    said = call(store, *valid_run, *shlex.split(flags.format(files=files)))
    assert_refused(said, 2, BAD_RUNS[flags])
    assert evidence(store) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(store: Path, valid_run: list[str]) -> None:
    """`--device cuda` names what there is instead."""
    assert_refused(call(store, *valid_run, "--device", "cuda"), 2, "device 'cuda': 0 GPUs found; allowed are auto, cpu")


@pytest.mark.parametrize("words", BAD_OTHERS)
def test_another_verb_is_refused(words: str, files: Path, store: Path) -> None:
    """The verbs that only read refuse what they cannot answer."""
    before = evidence(store)
    code, wanted = BAD_OTHERS[words]
    assert_refused(call(store, *shlex.split(words.format(files=files))), code, wanted)
    assert evidence(store) == before


def newer(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    sql(database(folder), "UPDATE alembic_version SET version_num = '0999'")


def not_sqlite(folder: Path, store: Path) -> None:
    folder.mkdir()
    database(folder).write_bytes(b"prompt,answer\n" * 500)


def foreign(folder: Path, store: Path) -> None:
    folder.mkdir()
    sql(database(folder), "CREATE TABLE invoices (id INTEGER)")


def damaged_policy(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    sql(database(folder), "UPDATE policies SET policy = '{}'")


def damaged_dossier(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    sql(database(folder), """UPDATE runs SET outcome = '{"dossier": {"version": 1}}'""")


def damaged_studies(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    (folder / "optuna.db").write_bytes(b"prompt,answer\n" * 500)


def newer_studies(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    sql(folder / "optuna.db", "UPDATE alembic_version SET version_num = 'v9.9.0'")


def foreign_studies(folder: Path, store: Path) -> None:
    shutil.copytree(store, folder)
    (folder / "optuna.db").unlink()
    sql(folder / "optuna.db", "CREATE TABLE studies (id INTEGER)")


def a_file(folder: Path, store: Path) -> None:
    folder.write_text("a file")


def nothing(folder: Path, store: Path) -> None:
    assert not folder.exists()


@pytest.mark.parametrize(
    ("verb", "make", "code", "wanted"),
    [
        *((verb, newer, 2, "schema 0999, this draftpick reads up to 0001") for verb in VERBS),
        *((verb, not_sqlite, 2, "file is not a database") for verb in VERBS),
        *((verb, foreign, 2, "the table 'invoices' of another program") for verb in VERBS),
        *((verb, damaged_policy, 2, "broken/evidence.db: policy lacks the key 'version'") for verb in VERBS[1:]),
        ("report", damaged_dossier, 2, "dossier lacks the key"),
        ("run", damaged_studies, 2, "optuna.db: file is not a database; move the file away"),
        ("run", newer_studies, 2, "no longer compatible with the table schema"),
        ("run", foreign_studies, 2, "no such column"),
        ("run", a_file, 2, "its folder cannot be made: File exists"),
        *((verb, a_file, 3, "no store in") for verb in VERBS[1:]),
        *((verb, nothing, 3, "no store in") for verb in VERBS[1:]),
    ],
)
def test_a_store_is_refused(
    verb: str,
    make: Callable[[Path, Path], None],
    code: int,
    wanted: str,
    store: Path,
    valid_run: list[str],
    tmp_path: Path,
) -> None:
    """A store that cannot be read, or is not there, is named and left as it was."""
    folder = tmp_path / "broken"
    make(folder, store)
    file = database(folder)
    before = file.read_bytes() if file.exists() else None
    more = {"run": valid_run[1:], "report": ["--out", str(tmp_path / "chart.png")]}
    said = call(folder, verb, *more.get(verb, []))
    assert_refused(said, code, wanted)
    assert (file.read_bytes() if file.exists() else None) == before


def test_lookup_before_any_run_is_not_measured(tmp_path: Path) -> None:
    """An empty store has no policy to answer from."""
    database(tmp_path).touch()
    assert_refused(call(tmp_path, "lookup"), 3, "no policy in store")


def test_without_a_verb_the_help_is_shown(tmp_path: Path) -> None:
    """`tune.py` alone is a question, not a mistake."""
    said = call(tmp_path)
    assert said.code == 0
    assert re.search(r"run +Measure every draft", said.stdout)
    assert said.stderr == ""


def test_names_are_never_read_as_markup(store: Path, tmp_path: Path) -> None:
    """Brackets in the names of a store and of a target are shown as they are."""
    folder = tmp_path / "[bold]"
    shutil.copytree(store, folder)
    sql(database(folder), "UPDATE models SET name = 'a[/b]'")
    said = call(folder, "show")
    assert said.code == 0
    assert "a[/b]" in said.stdout
    assert "[bold]" in said.stdout.replace("\n", "")
