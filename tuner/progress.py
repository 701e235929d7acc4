"""The stage under way, its bar and the time left, on stderr; one line per stage where stderr is no terminal."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StageProgress:
    """A context manager whose `update` fits `tuner.evidence.Progress`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        quiet = not console.is_terminal  # a disabled bar also leaves out the empty line at its end
        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("left"), console=console, transient=True, disable=quiet)
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Unit `done` of `total` begins."""
        if stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total)
            if not self._console.is_terminal:
                self._console.print(f"{stage}: {total} units", markup=False)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)
