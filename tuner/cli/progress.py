"""The stage under way, its bar and the time left, on stderr.

Where stderr is no terminal, a line per stage and one every 30 s. Drawing happens only inside `update`, which is called
between units: a thread that redraws would take time from the runs being measured.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

MIN_SECONDS_BETWEEN_DRAWS = 0.25
SECONDS_BETWEEN_LINES = 30.0


class StageProgress:
    """A context manager; `update` is called before every unit of a run. `clock` counts seconds from any moment."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._draws = console.is_terminal and not console.is_dumb_terminal
        columns = (
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, TextColumn("left"), console=console, auto_refresh=False, transient=True)
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._began_at = self._shown_at = 0.0  # the stage, and its last picture or line

    def __enter__(self) -> Self:
        if self._draws:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._draws:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Unit `done` of `total` begins; a new stage is shown at once, other changes after a pause."""
        now, begins = self._clock(), stage != self._stage
        if begins:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total)
            self._began_at = now
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)
        pause_s = MIN_SECONDS_BETWEEN_DRAWS if self._draws else SECONDS_BETWEEN_LINES
        if not begins and now - self._shown_at < pause_s:
            return
        if self._draws:
            self._bar.refresh()
        elif begins:
            self._console.print(f"{stage}: {total} units", markup=False, soft_wrap=True)
        elif done > 0:
            left_s = (now - self._began_at) / done * (total - done)
            line = f"{stage}: {done} of {total} units, about {left_s:.0f} s left"
            self._console.print(line, markup=False, soft_wrap=True)
        self._shown_at = now
