"""What commands print cannot steer a terminal."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from tuner.cli.messages import prompt_notes
from tuner.cli.output import console, print_lines, print_text

CLIPBOARD = "\x1b]52;c;eA==\x07"  # writes the clipboard of some terminals


def test_tables_show_no_escape_sequences() -> None:
    """Neither of a cell, a title, a header nor styled text; the table's own styles stay."""
    table = Table(f"device{CLIPBOARD}", title=f"title{CLIPBOARD}")
    table.add_row("\x1b[2Jname\u202e")
    table.add_row(Text("styled\x1b[0m", style="bold"))
    shown = console()
    shown.file = io.StringIO()
    shown.print(table)
    text = shown.file.getvalue()
    assert "name" in text
    assert "styled" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_lines_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A line is one line; text keeps its line breaks."""
    print_lines(f"a\nb{CLIPBOARD}")
    print_text(f"c\nd{CLIPBOARD}\n")
    assert capsys.readouterr().out == "a b ]52;c;eA== \nc\nd ]52;c;eA== \n"


@pytest.mark.parametrize(
    ("domains", "notes"),
    [
        ({"code": 11}, ["11 prompts: nothing can be proven, 12 are needed, better 34"]),
        ({"code": 20}, ["20 prompts: only a large gain can be proven; 34 are better, 24 of them for the proof"]),
        ({"code": 34}, []),
        ({"code": 30, "qa": 8}, ["no choice of their own: qa (8); a domain needs 24 prompts"]),
        (
            dict.fromkeys("abcdefg", 10),
            ["no choice of their own: a (10), b (10), c (10), d (10), e (10) and 2 more; a domain needs 24 prompts"],
        ),
    ],
)
def test_what_cannot_be_proven_is_said_before(domains: dict[str, int], notes: list[str]) -> None:
    """With the number of prompts that would do, in a line or two however many domains there are."""
    assert list(prompt_notes(domains)) == notes
