"""Text for people: safe to print, and naming the command line as they call it. Standard library only."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT_SCRIPT = "tune.py"


def printable(text: str) -> str:
    """`text` as one line that cannot steer a terminal: each character that cannot be shown becomes a space."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str) -> str:
    """60 characters at most."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def map_text(raw: Any, change: Callable[[str], str]) -> Any:
    """JSON values with all text changed, keys included."""
    if isinstance(raw, dict):
        return {change(name): map_text(value, change) for name, value in raw.items()}
    if isinstance(raw, list):
        return [map_text(value, change) for value in raw]
    return change(raw) if isinstance(raw, str) else raw


def command(arguments: str = "") -> str:
    """The command line as this installation has it: `tune.py ARGUMENTS` in a checkout, else `draftpick ARGUMENTS`."""
    in_checkout = (Path(__file__).parents[2] / CHECKOUT_SCRIPT).exists() and Path(sys.argv[0]).name != "draftpick"
    return f"{CHECKOUT_SCRIPT if in_checkout else 'draftpick'} {arguments}".rstrip()
