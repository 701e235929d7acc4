"""README, docs and the command line agree: commands, options, exit codes, public names."""

import importlib
import re
import subprocess
import sys

import pytest
import typer

from profiles.records import errors
from tests import ROOT
from tuner.cli import app as cli
from tuner.cli import messages

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "cli.md"
}
TOP = {
    name: command
    for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    if not command.hidden
}
COMMANDS = {name: command for name, command in TOP.items() if not hasattr(command, "commands")} | {
    f"{name} {inner}": command
    for name, group in TOP.items()
    for inner, command in getattr(group, "commands", {}).items()
}
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    for name, command in COMMANDS.items()
}
SPELLED = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@pytest.mark.parametrize("command", sorted(TOP))
def test_every_command_is_in_the_readme(command: str) -> None:
    """In the table of commands."""
    assert re.search(rf"\| `{command}` \|", PAGES["README.md"])


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_in_the_docs_take_their_options(page: str) -> None:
    """Every indented or fenced line that calls draftpick names options of that command only."""
    for line in PAGES[page].replace("\\\n", " ").splitlines():
        called = re.search(r"(?:tune\.py|draftpick) +(bundle \w+|[\w-]+)", line)
        if called and called.group(1) in OPTIONS and not line.startswith("|"):
            options = set(SPELLED.findall(re.sub(r"--launch '[^']*'", "--launch", line)))
            assert options <= OPTIONS[called.group(1)] | {"--help"}, line


def test_the_reference_of_commands_is_current() -> None:
    """docs/cli.md is what `typer tuner/cli/app.py utils docs --name draftpick --title "Command line"` prints."""
    arguments = ["tuner/cli/app.py", "utils", "docs", "--name", "draftpick", "--title", "Command line"]
    done = subprocess.run(
        [sys.executable, "-m", "typer", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").strip() == done.stdout.strip()


@pytest.mark.parametrize("page", ["README.md", "docs/deployment.md"])
def test_every_exit_code_has_a_row(page: str) -> None:
    """The codes of the errors and of the ways a run can end."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds} - {1}  # 1 is the base class's, raised by nothing
    codes |= {0, messages.EXIT_NOT_PROVEN, messages.EXIT_NOTHING_FEASIBLE, messages.EXIT_INTERRUPTED}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES[page], re.MULTILINE)} == codes


def test_public_names_exist() -> None:
    """Every dotted name of docs/api.md can be imported."""
    names = re.findall(r"`((?:profiles|store|tuner)(?:\.\w+)+)`", PAGES["docs/api.md"])
    assert len(names) > 25
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_readme_is_a_page() -> None:
    """At most 200 lines; everything else is in docs/."""
    assert len(PAGES["README.md"].splitlines()) <= 200
