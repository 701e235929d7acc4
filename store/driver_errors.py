"""What a database driver's error means, in one line with the next step: by SQLite's result code or SQLSTATE.

Neither driver is imported here, and a password is in none of these lines.
"""

import re

from profiles.records.text import printable

_LOCKED = "another process keeps it locked: wait for it to end, then run again"
_FULL = "the disk is full: what was saved before is kept; free space, then run again"
_READ_ONLY = "it is read-only: allow writing or name another store"
_LOST = "the connection was lost: what was saved before is kept; run again when the server is back"
_DAMAGED = "its files are damaged: restore a copy or name another store"
_NOT_CONNECTED = "start the server, or correct host, port, user, password and database in the URL"

_SQLITE_BUSY = 5
_SQLITE = {  # by primary result code
    _SQLITE_BUSY: _LOCKED,
    6: _LOCKED,
    8: _READ_ONLY,
    10: "the disk failed or is full: what was saved before is kept",
    11: "the file is damaged: restore a copy or name another store",
    13: _FULL,
    14: "it cannot be opened: name a file in a folder that may be written",
    26: "it is not a SQLite database: name another store",
}
_POSTGRESQL = {  # by SQLSTATE, or its first two characters
    "08": _LOST,
    "28": _NOT_CONNECTED,
    "3D": _NOT_CONNECTED,
    "0A000": _READ_ONLY,  # what a standby says to a write
    "25006": _READ_ONLY,
    "42501": "the role may not do that: grant it the right to create and write, or name another role",
    "53100": _FULL,
    "53200": "the server is out of memory: what was saved before is kept",
    "53300": "the server takes no more connections: wait, then run again",
    "55P03": _LOCKED,
    "57P": _LOST,
    "58": "the server's disk failed or is full: what was saved before is kept",
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}
_TRANSIENT = ("08", "40001", "40P01", "53300", "57P01", "57P02", "57P03")
_LONGEST = 300
_NOISE = re.compile(r"^(?:connection failed: )?(?:connection to server at .*? failed: )?(?:FATAL: +)?", re.DOTALL)


def reason(error: BaseException) -> str:
    """The driver's first sentence, and what it means and asks for where that is known; one line."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy keeps the driver's error in it
    text, meaning = _first_line(str(cause)), _meaning(error, cause)
    return text if meaning is None else f"{text}: {meaning}"


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed a moment later: a lock, a lost connection, a server that starts."""
    cause = getattr(error, "orig", None) or error
    if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        return bool(code & 0xFF == _SQLITE_BUSY)
    if state := getattr(cause, "sqlstate", None):
        return bool(state.startswith(_TRANSIENT))
    return _is_about_connection(cause)


def _is_about_connection(cause: BaseException) -> bool:
    """A connection that was lost or could not be made has no SQLSTATE, only a class and libpq's text."""
    names = ("OperationalError", "InterfaceError", "ConnectionTimeout")
    return hasattr(cause, "sqlstate") and type(cause).__name__ in names


def _meaning(error: BaseException, cause: BaseException) -> str | None:
    if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        return _SQLITE.get(code & 0xFF)  # the low byte is the primary code
    if state := getattr(cause, "sqlstate", None):
        return next((_POSTGRESQL[key] for key in (state, state[:3], state[:2]) if key in _POSTGRESQL), None)
    if not _is_about_connection(cause):
        return None
    return _LOST if getattr(error, "connection_invalidated", False) else _NOT_CONNECTED


def _first_line(text: str) -> str:
    """Of several attempts (a host with two addresses) the last counts; what libpq says around it is left out."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    tried = [line for line in lines if " failed: " in line]
    last = (tried or lines or ["no reason was given"])[-1 if tried else 0]
    return printable(_NOISE.sub("", last).strip())[:_LONGEST]
