"""README and `--help` agree: every verb, every option and every exit code is in both, and nothing else is."""

import re

import pytest
import typer

from profiles.records import errors
from tests import ROOT
from tuner.cli import app as tune
from tuner.cli import messages

# without the commands of other programs that are told to `--launch`
README = re.sub(r"(--launch) '[^']*'", r"\1", (ROOT / "README.md").read_text(encoding="utf-8"))
VERBS = typer.main.get_command(tune.app).commands  # type: ignore[attr-defined]
COMMANDS = {name: verb for name, verb in VERBS.items() if not hasattr(verb, "commands")} | {
    f"{name} {inner}": verb for name, group in VERBS.items() for inner, verb in getattr(group, "commands", {}).items()
}
OPTIONS = {
    name: {option for one in verb.params for option in one.opts if option.startswith("--")} - {"--help"}
    for name, verb in COMMANDS.items()
}
SPELLED = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OTHER_TOOLS = {"--from", "--require-hashes", "--disable-radix-cache"}  # options of other programs that README mentions


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_row(verb: str) -> None:
    """In the table of verbs."""
    assert re.search(rf"\| `tune\.py {verb}[ `]", README)


def test_every_option_is_explained() -> None:
    """README names every option of every verb at least once."""
    missing = {option for options in OPTIONS.values() for option in options} - set(SPELLED.findall(README))
    assert missing == set()


def test_every_option_in_readme_exists() -> None:
    """README names no option that no verb takes."""
    assert set(SPELLED.findall(README)) - set().union(*OPTIONS.values()) - OTHER_TOOLS - {"--help"} == set()


def test_commands_in_readme_are_complete() -> None:
    """Options on a line that calls a verb are options of that verb."""
    lines = README.replace("\\\n", " ").splitlines()
    for line in lines:
        called = re.search(r"tune\.py (bundle \w+|\w+)", line)
        if called and called.group(1) in OPTIONS and line.startswith("    "):
            assert set(SPELLED.findall(line)) <= OPTIONS[called.group(1)], line


def test_every_exit_code_has_a_row() -> None:
    """The codes of the errors and of the ways a run can end."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds} - {1}  # 1 is the base class's, raised by nothing
    codes |= {0, messages.EXIT_NOT_PROVEN, messages.EXIT_NOTHING_FEASIBLE, messages.EXIT_INTERRUPTED}
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert rows == codes


def test_every_help_sentence_ends() -> None:
    """Every option says what it is for."""
    for verb in (*VERBS.values(), *COMMANDS.values()):
        assert verb.help.endswith(".")
        assert all(one.help and one.help.strip() for one in verb.params)
