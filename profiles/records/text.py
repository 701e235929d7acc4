"""Text for people: safe to print, and naming the command line as they call it. Standard library only."""

import sys
from pathlib import Path
from typing import Any

CHECKOUT_SCRIPT = "tune.py"


def printable(text: str) -> str:
    """`text` as one line that cannot steer a terminal: each character that cannot be shown becomes a space."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str) -> str:
    """60 characters at most."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable_values(raw: Any) -> Any:
    """JSON values with all text printable."""
    if isinstance(raw, dict):
        return {name: printable_values(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [printable_values(value) for value in raw]
    return printable(raw) if isinstance(raw, str) else raw


def command(arguments: str = "") -> str:
    """The command line as this installation has it: `tune.py ARGUMENTS` in a checkout, else `draftpick ARGUMENTS`."""
    in_checkout = (Path(__file__).parents[2] / CHECKOUT_SCRIPT).exists() and Path(sys.argv[0]).name != "draftpick"
    return f"{CHECKOUT_SCRIPT if in_checkout else 'draftpick'} {arguments}".rstrip()
