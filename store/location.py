"""Where the store is: the folder, file or server that was named, and the file with the evidence in it."""

import os
from pathlib import Path

from sqlalchemy import make_url

from profiles.records.errors import NotMeasuredError, StoreError
from profiles.records.files import user_folder
from profiles.records.text import CHECKOUT_SCRIPT, command
from store.database import Location, is_url, name_of

FILE_NAME = "evidence.db"
CHECKOUT_FOLDER = ".draftpick"
FILE_SUFFIXES = (".db", ".sqlite", ".sqlite3")


def store_location(option: str | None) -> Location:
    """The location named by `--store`, else $DRAFTPICK_STORE, else a checkout's `.draftpick`, else the user's folder.

    Args: option: a folder, a file that ends with `.db` or `.sqlite`, `sqlite:///FILE` or a PostgreSQL URL.
    """
    named = option or os.environ.get("DRAFTPICK_STORE")
    if named and named.startswith("sqlite:"):
        database = make_url(named).database if named.startswith("sqlite://") else None
        if not database or database == ":memory:":
            raise StoreError(f"store {named}: sqlite:///FILE, or sqlite:////FILE from the root, is needed")
        return Path(database)
    if named and is_url(named):
        return named
    path = Path(named) if named else _default_folder()
    is_file = path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir())
    return path if is_file else path / FILE_NAME


def existing_store(option: str | None) -> Location:
    """As `store_location`. Raises NotMeasuredError when there is no such file."""
    location = store_location(option)
    if isinstance(location, Path) and not location.exists():
        raise NotMeasuredError(
            f"no store in {store_name(location)}: run `{command('run')}` first, or name another with --store"
        )
    return location


def store_name(location: Location) -> str:
    """The name for messages: the folder of a file with the usual name, another file, or a URL without password."""
    if isinstance(location, Path):
        return str(location.parent if location.name == FILE_NAME else location)
    return name_of(location)


def _default_folder() -> Path:
    """The folder that `make tune` fills, where this is a checkout in which it ran; else the user's data folder."""
    checkout = Path(__file__).parents[1]
    folder = checkout / CHECKOUT_FOLDER
    return folder if (checkout / CHECKOUT_SCRIPT).is_file() and folder.is_dir() else user_folder("data")
