"""The stage under way, its bar and the time left, over a table of how the candidates stand, on stderr.

Where stderr is no terminal, a line per stage and one every 30 s. Drawing happens only inside `update` and `standings`,
which are called between units: a thread that redraws would take time from the runs being measured.
"""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from profiles.records.core import PLAIN, Interval
from tuner.policy.estimates import Standing

MIN_SECONDS_BETWEEN_DRAWS = 0.25
SECONDS_BETWEEN_LINES = 30.0
MOST_ROWS = 12
WIDE = 80  # columns from which intervals are spelled out
LINES_OF_BAR = 2  # and of the cursor under it


class StageProgress:
    """A context manager whose `update` fits `Progress` and whose `standings` fits `Show`.

    `clock` counts seconds from any moment.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._draws = console.is_terminal and not console.is_dumb_terminal
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, TextColumn("left"), console=console)
        self._rows: tuple[Standing, ...] = ()
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._drawn_at: float | None = None
        self._began_at = self._line_at = 0.0  # the stage, and its last line where nothing is drawn
        self._live = Live(console=console, auto_refresh=False, transient=True, get_renderable=self._picture)

    def __enter__(self) -> Self:
        if self._draws:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Unit `done` of `total` begins."""
        begins = stage != self._stage
        if begins:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total)
        if not self._draws:
            self._print_line(stage, done, total, begins=begins)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)
        self._draw(at_once=begins)  # a stage may be one long unit, for which nothing is drawn again

    def standings(self, rows: Sequence[Standing]) -> None:
        """The candidates of the operating point under way, all of one domain; they replace those shown before."""
        self._rows = tuple(rows)
        self._draw()

    def _print_line(self, stage: str, done: int, total: int, *, begins: bool) -> None:
        now = self._clock()
        if begins:
            self._began_at = self._line_at = now
            self._console.print(f"{stage}: {total} units", markup=False, soft_wrap=True)
        elif now - self._line_at >= SECONDS_BETWEEN_LINES and done > 0:
            self._line_at = now
            left_s = (now - self._began_at) / done * (total - done)
            line = f"{stage}: {done} of {total} units, about {left_s:.0f} s left{_best_so_far(self._rows)}"
            self._console.print(line, markup=False, soft_wrap=True)

    def _draw(self, *, at_once: bool = False) -> None:
        """At most four times a second; what is left out stands in the next picture."""
        now = self._clock()
        is_due = self._drawn_at is None or now - self._drawn_at >= MIN_SECONDS_BETWEEN_DRAWS
        if self._live.is_started and (at_once or is_due):
            self._drawn_at = now
            self._live.refresh()

    def _picture(self) -> RenderableType:
        if not self._rows:
            return self._bar
        for most_rows in range(MOST_ROWS, 0, -1):  # down to what leaves the bar in sight, however names are folded
            table = standings_table(self._rows, most_rows, wide=self._console.width >= WIDE)
            if len(self._console.render_lines(table)) + LINES_OF_BAR <= self._console.height:
                break
        return Group(table, self._bar)


def standings_table(rows: Sequence[Standing], most_rows: int = MOST_ROWS, *, wide: bool = True) -> Table:
    """The best forecasts first, `most_rows` at most, plain decoding always among them; what has no forecast last.

    Not `wide` spells intervals shorter, for 60 columns.
    """
    ordered = sorted(rows, key=_rank)
    shown = ordered[:most_rows]
    plain = next((row for row in ordered if row.setup_name == PLAIN.name), None)
    if plain is not None and plain not in shown:
        shown[-1] = plain
    left_out = len(ordered) - len(shown)
    table = Table(
        box=None,
        padding=(0, 2 if wide else 1, 0, 0),
        title=Text(f"{rows[0].domain}: speed-up over plain decoding (95 %)", style="bold") if rows else None,
        title_justify="left",
        caption=f"and {left_out} more" if left_out else None,
        caption_justify="left",
    )
    table.add_column("candidate", overflow="fold")
    for name in ("forecast", "measured"):
        table.add_column(name, no_wrap=True)
    table.add_column("state", overflow="fold")
    for row in shown:
        style = "bold" if row.measured is not None else "dim" if row.setup_name == PLAIN.name else ""
        figures = (_figure(row.forecast, wide=wide), _figure(row.measured, wide=wide))
        table.add_row(Text(row.setup_name), *figures, Text(row.state), style=style)
    return table


def _best_so_far(rows: Sequence[Standing]) -> str:
    """The best candidate by what was measured, before that by forecast."""
    measured = [(row.measured, row) for row in rows if row.measured is not None and row.setup_name != PLAIN.name]
    figures = measured or [(row.forecast, row) for row in rows if row.forecast is not None]
    if not figures:
        return ""
    ratio, row = max(figures, key=lambda entry: entry[0].estimate)
    return f"; {row.domain}: {row.setup_name} at {_figure(ratio)} is the best so far ({row.state})"


def _rank(row: Standing) -> tuple[float, str]:
    """Plain decoding without a forecast stands where it belongs, at 1."""
    unknown = 1.0 if row.setup_name == PLAIN.name else float("-inf")
    return -(row.forecast.estimate if row.forecast is not None else unknown), row.setup_name


def _figure(ratio: Interval | None, *, wide: bool = True) -> str:
    if ratio is None:
        return ""
    if ratio.low == ratio.high:
        return f"{ratio.estimate:.2f}"
    return f"{ratio:.2f}" if wide else f"{ratio.estimate:.2f} {ratio.low:.2f}-{ratio.high:.2f}"
