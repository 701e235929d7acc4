"""What a database driver's error means, in one line with the next step, for SQLite and PostgreSQL.

Drivers are known by their codes and words only: neither is imported here. A password is in none of these lines.
"""

import re

from profiles.records.text import printable

_LOCKED = "another process keeps it locked: wait for it to end, then run again"
_FULL = "the disk is full: what was saved before is kept; free space, then run again"
_READ_ONLY = "it is read-only: allow writing or name another store"
_LOST = "the connection was lost: what was saved before is kept; run again when the server is back"
_NO_RIGHTS = "the role may not do that: grant it the right to create and write, or name another role"

_SQLITE = {  # by primary result code
    5: _LOCKED,
    6: _LOCKED,
    8: _READ_ONLY,
    10: "the disk failed or is full: what was saved before is kept",
    11: "the file is damaged: restore a copy or name another store",
    13: _FULL,
    14: "it cannot be opened: name a file in a folder that may be written",
    26: "it is not a SQLite database: name another store",
}
_SQLITE_BUSY = 5
_LONGEST = 300
_POSTGRESQL = {  # by SQLSTATE, or its first two characters
    "08": _LOST,
    "0A000": _READ_ONLY,  # what a standby says to a write
    "25006": _READ_ONLY,
    "28": "check the user and the password in the URL",
    "3D": "make the database first (`createdb`), or name another",
    "42501": _NO_RIGHTS,
    "53100": _FULL,
    "53200": "the server is out of memory: what was saved before is kept",
    "53300": "the server takes no more connections: wait, then run again",
    "55P03": _LOCKED,
    "57P01": _LOST,
    "57P02": _LOST,
    "57P03": "the server is starting or stopping: wait, then run again",
    "58": "the server's disk failed or is full: what was saved before is kept",
    "XX001": "the server's files are damaged: restore a copy or name another store",
    "XX002": "the server's files are damaged: restore a copy or name another store",
}
_PASSING = ("08", "53300", "57P01", "57P02", "57P03")
_UNREACHABLE = "no server answers there: start it, or correct host and port in the URL"
_SAID = (  # while connecting there is no SQLSTATE, only what the server or libpq says
    ("password", _POSTGRESQL["28"]),
    ("authentication", _POSTGRESQL["28"]),
    ("pg_hba.conf", "the server refuses this host or user: allow it in pg_hba.conf"),
    ("too many", _POSTGRESQL["53300"]),
    ("remaining connection slots", _POSTGRESQL["53300"]),
    ("starting up", _POSTGRESQL["57P03"]),
    ("shutting down", _POSTGRESQL["57P03"]),
    ('role "', _POSTGRESQL["28"]),
    ('database "', _POSTGRESQL["3D"]),
    ("closed the connection", _LOST),
    ("terminating connection", _LOST),
    ("connection is closed", _LOST),
    ("connection is lost", _LOST),
    ("consuming input", _LOST),
    ("sending query", _LOST),
    ("refused", _UNREACHABLE),
    ("timeout", _UNREACHABLE),
    ("resolve", _UNREACHABLE),
    ("translate host name", _UNREACHABLE),
    ("Name or service", _UNREACHABLE),
    ("No such file", _UNREACHABLE),
    ("unreachable", _UNREACHABLE),
    ("No route", _UNREACHABLE),
)
_TRIED_AGAIN = (_LOST, _UNREACHABLE, _POSTGRESQL["53300"], _POSTGRESQL["57P03"])
_NOISE = re.compile(r"^(?:connection failed: )?(?:connection to server at .*? failed: )?(?:FATAL: +)?", re.DOTALL)


def reason(error: BaseException) -> str:
    """The driver's first sentence, and what it means and asks for where that is known; one line."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy keeps the driver's error in it
    meant = _meant(cause)
    said = _first_line(str(cause))
    return said if meant is None else f"{said}: {meant}"


def passes(error: BaseException) -> bool:
    """Whether the same may succeed a moment later: a lock, a lost connection, a server that starts."""
    cause = getattr(error, "orig", None) or error
    code: int | None = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF == _SQLITE_BUSY
    return _meant(cause) in _TRIED_AGAIN


def _meant(cause: BaseException) -> str | None:
    code: int | None = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return _SQLITE.get(code & 0xFF)  # the low byte is the primary code
    if not hasattr(cause, "sqlstate"):
        return None
    state: str = cause.sqlstate or ""
    if state:
        return _POSTGRESQL.get(state, _POSTGRESQL.get(state[:2]))
    text = str(cause)
    return next((meaning for words, meaning in _SAID if words in text), None)


def _first_line(text: str) -> str:
    """Of several attempts (a host with two addresses) the last counts; what libpq says around it is left out."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    tried = [line for line in lines if " failed: " in line]
    said = _NOISE.sub("", (tried or lines or ["no reason was given"])[-1 if tried else 0]).strip()
    return printable(said)[:_LONGEST]
