"""Where the store is: the folder or server that was named, and the file with the evidence in it.

What is in the store it must not know.
"""

import os
from pathlib import Path

import platformdirs

from profiles.records.errors import NotMeasuredError
from store.database import Place, is_url, name_of

BOOK_NAME = "evidence.db"


def place(asked: str | None) -> Place:
    """What was asked for, else $DRAFTPICK_STORE, else the user's data folder: the server's URL, or a folder's file."""
    named = asked or os.environ.get("DRAFTPICK_STORE")
    if named and is_url(named):
        return named
    return (Path(named) if named else platformdirs.user_data_path("draftpick")) / BOOK_NAME


def existing(asked: str | None) -> Place:
    """As `place`. Raises NotMeasuredError when there is no such file."""
    found = place(asked)
    if isinstance(found, Path) and not found.exists():
        raise NotMeasuredError(f"no store in {found.parent}: run `tune.py run` first, or name another with --store")
    return found


def name(found: Place) -> str:
    """What people call it: the folder, or the URL without its password."""
    return str(found.parent) if isinstance(found, Path) else name_of(found)
