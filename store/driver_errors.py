"""What a database driver's error means, in one line with the next step: by SQLite's result code or SQLSTATE.

Neither driver is imported here, and a password is in none of these lines.
"""

import re

from profiles.records.text import printable

_SQLITE_BUSY = 5
_ADVICE: dict[str, tuple[int | str, ...]] = {  # SQLite's primary result codes; SQLSTATEs or their first characters
    "another process keeps it locked: wait for it to end, then run again": (_SQLITE_BUSY, 6, "55P03", "53300"),
    "it is read-only: allow writing, grant the right, or name another store": (8, 14, "25006", "0A000", "42501"),
    "the disk failed or is full: what was saved before is kept; free space, then run again": (10, 13, "53100", "58"),
    "it is damaged, or no store: restore a copy or name another store": (11, 26, "XX"),
    "what was saved before is kept; start the server, or correct the URL": ("08", "28", "3D", "57P"),
}
_TRANSIENT = ("08", "40001", "40P01", "53300", "57P01", "57P02", "57P03")
_LOST = ("OperationalError", "InterfaceError", "ConnectionTimeout")  # of a connection, which has no SQLSTATE
_NOISE = re.compile(r"^(?:connection failed: )?(?:connection to server at .*? failed: )?(?:FATAL: +)?", re.DOTALL)


def reason(error: BaseException) -> str:
    """The driver's first sentence and what to do, as far as that is known; one line."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy keeps the driver's error in it
    lines = [line.strip().removeprefix("- ") for line in str(cause).splitlines() if line.strip()]
    tried = [line for line in lines if " failed: " in line][-1:]  # of a host with two addresses the last
    text = printable(_NOISE.sub("", (tried or lines or ["no reason was given"])[0]).strip())[:300]
    code = _code(cause)
    advice = [advice for advice, codes in _ADVICE.items() if any(_is_of(code, listed) for listed in codes)]
    return ": ".join([text, *advice[:1]])


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed a moment later: a lock, a lost connection, a server that starts."""
    code = _code(getattr(error, "orig", None) or error)
    return code == _SQLITE_BUSY or (isinstance(code, str) and code.startswith(_TRANSIENT))


def _code(cause: BaseException) -> int | str | None:
    """SQLite's primary result code or the SQLSTATE; `08` of a connection that was lost or could not be made."""
    if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        return int(code) & 0xFF
    if state := getattr(cause, "sqlstate", None):
        return str(state)
    return "08" if hasattr(cause, "sqlstate") and type(cause).__name__ in _LOST else None


def _is_of(code: int | str | None, listed: int | str) -> bool:
    return code == listed or (isinstance(code, str) and isinstance(listed, str) and code.startswith(listed))
