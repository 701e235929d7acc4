"""The stage under way, its bar and the time left, under the best candidate so far, on stderr.

Where stderr is no terminal, a line per stage and one every 30 s. Drawing happens only inside `update` and `best`, which
are called between units: a thread that redraws would take time from the runs being measured.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

MIN_SECONDS_BETWEEN_DRAWS = 0.25
SECONDS_BETWEEN_LINES = 30.0


class StageProgress:
    """A context manager whose `update` fits `Progress` and whose `best` fits `Show`.

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
        self._best = ""
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

    def best(self, line: str) -> None:
        """The best candidate of the operating point under way; it replaces the one shown before."""
        self._best = line
        self._draw()

    def _print_line(self, stage: str, done: int, total: int, *, begins: bool) -> None:
        now = self._clock()
        if begins:
            self._began_at = self._line_at = now
            self._console.print(f"{stage}: {total} units", markup=False, soft_wrap=True)
        elif now - self._line_at >= SECONDS_BETWEEN_LINES and done > 0:
            self._line_at = now
            left_s = (now - self._began_at) / done * (total - done)
            line = f"{stage}: {done} of {total} units, about {left_s:.0f} s left"
            self._console.print("; ".join(filter(None, [line, self._best])), markup=False, soft_wrap=True)

    def _draw(self, *, at_once: bool = False) -> None:
        """At most four times a second; what is left out stands in the next picture."""
        now = self._clock()
        is_due = self._drawn_at is None or now - self._drawn_at >= MIN_SECONDS_BETWEEN_DRAWS
        if self._live.is_started and (at_once or is_due):
            self._drawn_at = now
            self._live.refresh()

    def _picture(self) -> RenderableType:
        return Group(Text(self._best, no_wrap=True, overflow="ellipsis"), self._bar) if self._best else self._bar
