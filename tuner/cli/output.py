"""How the verbs print: lines for people and for scripts, and the one JSON document.

What is printed it must not know. It does without rich, which look-ups do not need.
"""

import json
from collections.abc import Mapping
from typing import Any

import typer

from profiles.records.text import printable


def say(*lines: str) -> None:
    """On standard output; a line break in a name cannot pass for another line."""
    for line in lines:
        typer.echo(printable(line))


def say_aside(*lines: str) -> None:
    """On standard error, which a script does not read."""
    for line in lines:
        typer.echo(printable(line), err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """One line; flushed, so that a full disk is told; fine where standard output is closed."""
    typer.echo(json.dumps(document, allow_nan=False))
