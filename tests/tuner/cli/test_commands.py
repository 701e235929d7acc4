"""What all commands share: the name they are called by, the version, the choices of options, and missing extras."""

import ast
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from profiles.hardware.software import draftpick_version
from profiles.records.core import DTYPES
from profiles.records.text import command
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.support.cli import assert_refused, call, database
from tests.support.fakes import sql
from tuner import export
from tuner.cli import options
from tuner.cli.messages import EXTRA_MODULES

BASE_INSTALL = """
import sys
sys.modules |= dict.fromkeys(MODULES)  # None: cannot be imported
sys.argv = ["draftpick", *sys.argv[1:]]
from tuner.cli.app import main
main()
"""


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert call(tmp_path, "--version").stdout == f"draftpick {draftpick_version()}\n"


def test_messages_name_the_command_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout is started with its script, an installation with `draftpick`."""
    monkeypatch.setattr(sys, "argv", ["/checkout/tune.py"])
    assert command("run") == "tune.py run"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/draftpick"])
    assert command("run") == "draftpick run"
    monkeypatch.setattr("profiles.records.text.CHECKOUT_SCRIPT", "not-there.py")
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    assert command() == "draftpick"


def test_no_message_spells_the_command_itself() -> None:
    """Whoever installed `draftpick` has no `tune.py`."""
    files = [path for layer in ("profiles", "store", "tuner") for path in (ROOT / layer).rglob("*.py")]
    spelled = [
        f"{path}:{node.lineno}"
        for path in files
        if "training" not in path.parts and path.name != "text.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "tune.py" in node.value
    ]
    assert spelled == []


def test_options_offer_what_the_layers_below_know() -> None:
    assert set(typing.get_args(options.DTypeName)) == set(DTYPES)
    assert set(typing.get_args(options.FormatName)) == set(export.FORMS)
    engines = {engine for names in options.ENGINE_OPTIONS.values() for engine in names}
    assert engines < set(typing.get_args(options.EngineName))


def call_base_install(store: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """`draftpick WORDS` where none of the modules of an extra can be imported."""
    modules = {module for modules in EXTRA_MODULES.values() for module in modules} - {"psutil", "pynvml"}
    code = BASE_INSTALL.replace("MODULES", repr(modules))
    environment = {**os.environ, "DRAFTPICK_STORE": str(store)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("words", "extra"), [("run", "tune"), ("check", "tune"), ("report --out p.html", "report")])
def test_a_missing_extra_is_one_line(words: str, extra: str, sound_store: Path) -> None:
    """In a base install a command says which extra it needs."""
    ended = call_base_install(sound_store, *words.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: `{words.split(maxsplit=1)[0]}` needs the extra: pip install 'draftpick[{extra}]'\n"


@pytest.mark.parametrize("words", ["lookup", "lookup --json", "lookup --format vllm", "show", "--help", "--version"])
def test_a_base_install_answers(words: str, sound_store: Path) -> None:
    ended = call_base_install(sound_store, *words.split())
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", ["show", "lookup", "explain", "report --out OUT", "bundle pack OUT"])
def test_a_command_that_reads_needs_no_right_to_write(
    words: str, sound_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is never opened to be written."""
    monkeypatch.setattr(EvidenceStore, "open", None)
    said = call(sound_store, *words.replace("OUT", str(tmp_path / "out.html")).split())
    assert said.code == 0, said.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("tuner.selector", {"torch", "numpy", "sqlalchemy", "transformers", "optuna", "scipy", "rich"}),
        ("tuner.cli.app", {"torch", "numpy", "sqlalchemy", "rich"}),
        ("tuner.report.page", {"torch", "transformers", "optuna", "scipy"}),
        ("profiles.prompts.reader", {"torch", "transformers"}),
        ("store.inventory", {"torch", "transformers", "optuna", "alembic"}),
    ],
)
def test_imports_are_light(module: str, heavy: set[str]) -> None:
    script = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not heavy & set(ended.stdout.split())


def test_a_policy_file_answers_without_a_store(sound_store: Path, tmp_path: Path) -> None:
    """The file alone gives the answer that the store gives."""
    policy = tmp_path / "policy.json"
    shutil.copy(next(sound_store.glob("*.policy.json"), next(sound_store.glob("*.json"))), policy)
    stored, alone = (
        call(sound_store, "lookup", "--json"),
        call(tmp_path / "no store", "lookup", "--policy", policy, "--json"),
    )
    assert alone.code == 0, alone.stderr
    assert alone.document["answer"] == stored.document["answer"]
    assert alone.document["policy"] == str(policy)
    assert not (tmp_path / "no store").exists()
    assert call(tmp_path, "lookup", "--policy", policy).stdout == call(sound_store, "lookup").stdout
    assert_refused(call(tmp_path, "lookup", "--policy", policy, "--target", "nosuch"), 2, "the policy is of ")


def test_a_lookup_answers_for_the_engine_that_was_tuned(sound_store: Path, tmp_path: Path) -> None:
    """Without --engine; of several the user names one."""
    folder = tmp_path / "store"
    shutil.copytree(sound_store, folder)
    sql(database(folder), "UPDATE environments SET engine = 'vllm', engine_version = '0.33.0'")
    [(text,)] = sql(database(folder), "SELECT policy FROM policies")
    policy = json.loads(text)
    policy["environment"] |= {"engine": "vllm", "engine_version": "0.33.0"}
    sql(database(folder), f"UPDATE policies SET policy = '{json.dumps(policy)}'")
    match = call(folder, "lookup", "--json").document["answer"]["match"]
    assert not {row["field"] for row in match["differences"]} & {"engine"}
    columns = [row[1] for row in sql(database(folder), "PRAGMA table_info(environments)")]
    other = [{"digest": "'other'", "engine": "'draftpick-torch'"}.get(name, name) for name in columns]
    names = ", ".join(columns)
    sql(database(folder), f"INSERT INTO environments ({names}) SELECT {', '.join(other)} FROM environments")
    columns = [row[1] for row in sql(database(folder), "PRAGMA table_info(policies)") if row[1] != "id"]
    other = [{"environment_digest": "'other'"}.get(name, name) for name in columns]
    names = ", ".join(columns)
    sql(database(folder), f"INSERT INTO policies ({names}) SELECT {', '.join(other)} FROM policies")
    asked = call(folder, "lookup")
    assert_refused(asked, 2, "was tuned with several engines: name one with --engine: torch, vllm")
    assert call(folder, "lookup", "--engine", "torch").code == 0
