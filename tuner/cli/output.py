"""What commands write: lines for people, tables, and one JSON document for programs."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from profiles.records.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_lines(*lines: str) -> None:
    """Writes to standard output; a line break in a name cannot pass for another line."""
    for line in lines:
        typer.echo(printable(line))


def print_notes(*lines: str) -> None:
    """Writes to standard error, which a script does not read."""
    for line in lines:
        typer.echo(printable(line), err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Writes one line, flushed, so that a full disk is an error."""
    typer.echo(json.dumps(document, allow_nan=False))


def print_result(
    document: Mapping[str, Any], *lines: str, json_only: bool, table: "Callable[[], Table] | None" = None
) -> None:
    """Writes the document for programs, or the lines and the table for people."""
    if json_only:
        print_json(document)
        return
    print_lines(*lines)
    if table is not None:
        console().print(table())


def print_text(text: str) -> None:
    typer.echo("\n".join(map(printable, text.split("\n"))), nl=False)


def console(*, stderr: bool = False) -> "Console":
    """A console for tables; rich is imported where one is printed, because a look-up has no time for it."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        """Shows names, domains and devices from strangers without what would steer the terminal."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                text = "\n".join(map(printable, segment.text.split("\n")))
                yield segment if segment.control else Segment(text, segment.style)

    return PrintableConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
