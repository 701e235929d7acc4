"""The live table and the bar on a terminal, and the few lines that are printed where there is none."""

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from profiles.records.core import Interval
from tuner.cli.progress import StageProgress, standings_table
from tuner.policy.estimates import Standing

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


def row(name: str, forecast: float | None, measured: float | None = None, state: str = "forecast") -> Standing:
    """A candidate whose intervals reach 0.1 to both sides."""
    known = [
        None if value is None else Interval(estimate=value, low=value - 0.1, high=value + 0.1)
        for value in (forecast, measured)
    ]
    return Standing(domain="code", setup_name=name, forecast=known[0], measured=known[1], state=state)


ONE = Interval(estimate=1.0, low=1.0, high=1.0)
PLAIN_ROW = Standing(domain="code", setup_name="plain", forecast=ONE, measured=None, state="baseline")
ROWS = (
    PLAIN_ROW,
    row("ngram:max=4,min=2 k=7", 1.37, 1.34, "racing"),
    row("builtin:draft-code k=2", 0.87),
    row("no forecast k=1", None, state="infeasible"),
)


def lines_of(rows: Sequence[Standing], width: int, most_rows: int = 12, *, wide: bool = True) -> list[str]:
    """The table's lines as printed, without the blank ones."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(standings_table(rows, most_rows, wide=wide))
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def test_the_best_forecasts_stand_first() -> None:
    """Plain decoding stands at its 1, what has no forecast last; speed-ups with their intervals."""
    assert lines_of(ROWS, 100) == [
        "code: speed-up over plain decoding (95 %)",
        "candidate               forecast           measured           state",
        "ngram:max=4,min=2 k=7   1.37 [1.27, 1.47]  1.34 [1.24, 1.44]  racing",
        "plain                   1.00                                  baseline",
        "builtin:draft-code k=2  0.87 [0.77, 0.97]                     forecast",
        "no forecast k=1                                               infeasible",
    ]


def test_sixty_columns_are_enough() -> None:
    """Intervals are spelled shorter, and nothing is cut off."""
    lines = lines_of(ROWS, 60, wide=False)
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert "1.37 1.27-1.47" in text
    assert "1.34 1.24-1.44" in text
    assert "…" not in text


def test_twelve_rows_at_most_and_plain_decoding_among_them() -> None:
    """Of 20 candidates the best eleven and plain decoding are shown, and how many are not."""
    rows = [PLAIN_ROW, *(row(f"draft k={k}", 1.0 + k / 100) for k in range(1, 20))]
    lines = lines_of(rows, 100)
    names = [line.split("  ")[0].strip() for line in lines[2:-1]]
    assert names == [*(f"draft k={k}" for k in range(19, 8, -1)), "plain"]
    assert lines[-1].strip() == "and 8 more"
    assert [line.split()[0] for line in lines_of(rows, 100, 1)[2:-1]] == ["plain"]


@pytest.mark.parametrize("width", [100, 60])
def test_a_terminal_shows_the_table_over_the_bar(width: int) -> None:
    """Both fit the width, the bar stands last on a line of its own, and everything is cleared at the end."""
    screen = Screen(width=width)
    with StageProgress(screen.console, Clock()) as progress:
        progress.standings(ROWS)
        screen.new()
        progress.update("race code", 3, 48)
        *table, bar = re.sub(CONTROL, "", screen.new()).split("\n")
        assert "ngram:max=4,min=2" in "".join(table)
        assert bar.startswith("race code ")
        assert " 3/48 " in bar
        assert bar.rstrip().endswith("left")
        assert max(map(len, [*table, bar])) <= width
    assert ERASE_LINE in screen.new()


def test_names_are_not_markup() -> None:
    """A draft's folder may be called anything."""
    screen = Screen()
    with StageProgress(screen.console, Clock()) as progress:
        progress.standings([row("[red]draft[/] k=1", 1.2, state="[blink]")])
    text = screen.new()
    assert "[red]draft[/] k=1" in text
    assert "[blink]" in text


def test_it_draws_four_times_a_second_at_most() -> None:
    """What comes sooner stands in the next picture; a new stage is drawn at once."""
    clock, screen = Clock(), Screen()
    with StageProgress(screen.console, clock) as progress:
        progress.update("race code", 0, 48)
        assert "0/48" in screen.new()
        clock.now_s = 0.2
        progress.update("race code", 1, 48)
        progress.standings(ROWS)
        assert screen.new() == ""
        clock.now_s = 0.25
        progress.update("race code", 2, 48)
        drawn = screen.new()
        assert "2/48" in drawn
        assert "1.37 [1.27, 1.47]" in drawn
        progress.update("proof code", 0, 30)
        assert "0/30" in screen.new()


def test_a_low_terminal_keeps_its_bar() -> None:
    """The table gives up rows so that the bar is never pushed out of sight."""
    screen = Screen(height=8)
    rows = [PLAIN_ROW, *(row(f"draft k={k}", 1.0 + k / 100) for k in range(1, 20))]
    with StageProgress(screen.console, Clock()) as progress:
        progress.standings(rows)
        screen.new()
        progress.update("race code", 0, 48)
        drawn = screen.new()
    assert "race code" in drawn
    assert [k for k in range(1, 20) if f"draft k={k} " in drawn] == [18, 19]
    assert "plain" in drawn


def test_without_a_terminal_one_line_per_stage_is_printed() -> None:
    """No table, no bar, no control characters; a stage that is named again is not repeated."""
    screen = Screen(terminal=False)
    with StageProgress(screen.console, Clock()) as progress:
        progress.update("target trace", 0, 2)
        progress.standings(ROWS)
        progress.update("target trace", 1, 2)
        progress.update("race [code]", 0, 48)
    assert screen.new() == "target trace: 2 units\nrace [code]: 48 units\n"


def test_without_a_terminal_a_long_stage_says_what_is_left() -> None:
    """A line every 30 s at most: units, seconds left at the pace so far, and the best candidate."""
    clock, screen = Clock(), Screen(terminal=False)
    with StageProgress(screen.console, clock) as progress:
        for done in range(12):
            clock.now_s = 10.0 * done
            progress.update("race code", done, 48)
            progress.standings(ROWS)
    best = "code: ngram:max=4,min=2 k=7 at 1.34 [1.24, 1.44] is the best so far (racing)"
    assert screen.new().splitlines() == [
        "race code: 48 units",
        f"race code: 3 of 48 units, about 450 s left; {best}",
        f"race code: 6 of 48 units, about 420 s left; {best}",
        f"race code: 9 of 48 units, about 390 s left; {best}",
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
