"""Where the store is: the folder that was named, and the file with the evidence in it.

What is in the file it must not know.
"""

import os
from pathlib import Path

import platformdirs

from profiles.errors import NotMeasuredError

BOOK_NAME = "evidence.db"


def folder(asked: Path | None) -> Path:
    """The folder that was asked for, else $DRAFTPICK_STORE, else the user's data folder."""
    named = asked or os.environ.get("DRAFTPICK_STORE")
    return Path(named) if named else platformdirs.user_data_path("draftpick")


def existing(asked: Path | None) -> Path:
    """The file with the evidence. Raises NotMeasuredError when there is none."""
    path = folder(asked) / BOOK_NAME
    if not path.exists():
        raise NotMeasuredError(f"no store in {path.parent}: run `tune.py run` first, or name another with --store")
    return path
