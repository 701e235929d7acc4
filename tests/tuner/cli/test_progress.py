"""The bar on a terminal, and the few lines that are printed where there is none."""

import io
import re

import pytest
from rich.console import Console

from tuner.cli.progress import StageProgress

ERASE_LINE = "\x1b[2K"
CONTROL = r"\r|\x1b\[[0-9?]*[a-zA-Z]"


class Clock:
    """Shows the seconds it was set to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Screen:
    """A console that keeps what it is told; `new` is what came since it was last asked for."""

    def __init__(self, *, terminal: bool = True, width: int = 100, height: int = 40) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=terminal, width=width, height=height, color_system=None)

    def new(self) -> str:
        text = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return text


@pytest.mark.parametrize("width", [100, 60])
def test_a_terminal_shows_a_bar(width: int) -> None:
    """It fits the width, a name in it is no markup, and everything is cleared at the end."""
    screen = Screen(width=width)
    with StageProgress(screen.console, Clock()) as progress:
        screen.new()
        progress.update("race [red]x[/]", 3, 48)
        bar = re.sub(CONTROL, "", screen.new()).rpartition("race")[2]
        assert bar.startswith(" [red]x[/] ")
        assert " 3/48 " in bar
        assert bar.rstrip().endswith("left")
        assert len(bar) <= width
    assert ERASE_LINE in screen.new()


def test_it_draws_four_times_a_second_at_most() -> None:
    """What comes sooner stands in the next picture; a new stage is drawn at once."""
    clock, screen = Clock(), Screen()
    with StageProgress(screen.console, clock) as progress:
        progress.update("race code", 0, 48)
        assert "0/48" in screen.new()
        clock.now_s = 0.2
        progress.update("race code", 1, 48)
        assert screen.new() == ""
        clock.now_s = 0.25
        progress.update("race code", 2, 48)
        assert "2/48" in screen.new()
        progress.update("proof code", 0, 30)
        assert "0/30" in screen.new()


def test_without_a_terminal_one_line_per_stage_is_printed() -> None:
    """No bar, no control characters; a stage that is named again is not repeated."""
    screen = Screen(terminal=False)
    with StageProgress(screen.console, Clock()) as progress:
        progress.update("target trace", 0, 2)
        progress.update("target trace", 1, 2)
        progress.update("race [code]", 0, 48)
    assert screen.new() == "target trace: 2 units\nrace [code]: 48 units\n"


def test_without_a_terminal_a_long_stage_says_what_is_left() -> None:
    """A line every 30 s at most: units, and seconds left at the pace so far."""
    clock, screen = Clock(), Screen(terminal=False)
    with StageProgress(screen.console, clock) as progress:
        for done in range(12):
            clock.now_s = 10.0 * done
            progress.update("race code", done, 48)
    assert screen.new().splitlines() == [
        "race code: 48 units",
        "race code: 3 of 48 units, about 450 s left",
        "race code: 6 of 48 units, about 420 s left",
        "race code: 9 of 48 units, about 390 s left",
    ]


def test_an_exception_leaves_the_terminal_as_it_was() -> None:
    """The cursor comes back, also after Ctrl-C."""
    screen = Screen()

    def interrupted() -> None:
        with StageProgress(screen.console, Clock()) as progress:
            progress.update("race code", 0, 48)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in screen.new()
