"""What went wrong by a server's log, as one printable line."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from profiles.engines.serving.redaction import redacted
from profiles.records.errors import EngineError, OutOfMemoryError
from profiles.records.text import printable

MOST_READ_BYTES = 262_144
MOST_CHARACTERS = 300

_ERROR = re.compile(
    r"error|exception|fatal|fail|cannot|can't|couldn't|unable|invalid|unrecogni[sz]ed|unknown|unsupported|not found"
    r"|no such|out of memory|bad_alloc|killed|abort|terminate called|segmentation|panic|assert",
    re.IGNORECASE,
)
# lines that point to an error above, or to its source line
_POINTER = re.compile(
    r"root cause above|exiting due to|for further information|refused the arguments"
    r"|see (the )?(error|log|stack)s? above|see stack trace|validation errors? for|^\s*(at|File|raise) ",
    re.IGNORECASE,
)
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception): ")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|bad_alloc|cannot allocate memory|failed to allocate|unable to allocate"
    r"|no available memory|not enough memory|less than (desired (CPU|GPU)|requested) memory|memory allocation .*fail"
    r"|larger than the available KV cache memory",
    re.IGNORECASE,
)
_PORT_TAKEN = re.compile(r"address (is )?already in use|EADDRINUSE|errno 98|couldn't bind", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# what vLLM and Python's logging put before a message: process, level, date, source line
_PREFIX = re.compile(
    r"^(\([^()]*pid=\d+\)\s*)?((ERROR|CRITICAL|WARNING|INFO)[ :]+)?(\d[\d-]*[ T][\d:,.]+\s*)?(\[[\w./-]+:\d+\]\s*)?"
)


def last_error_line(log_path: Path, start: int = 0) -> str:
    """The last exception's message from byte `start` on, else the last line about an error, else the last line.

    At most 300 characters; empty where the log is empty or cannot be read.
    """
    lines = _lines(log_path, start)
    errors = [line for line in lines if _ERROR.search(line)]
    causes = [line for line in errors if not _POINTER.search(_PREFIX.sub("", line))]
    exceptions = [line for line in causes if _EXCEPTION.match(_PREFIX.sub("", line))]
    return _without_prefix(next((group[-1] for group in (exceptions, causes, errors, lines) if group), ""))


def error_of(what: str, log_path: Path, start: int = 0) -> EngineError:
    """The error for `what` went wrong, with the last error line; OutOfMemoryError where the log says memory ran out."""
    memory_lines = [line for line in _lines(log_path, start) if is_out_of_memory(line)]
    line = _without_prefix(memory_lines[-1]) if memory_lines else last_error_line(log_path, start)
    kind = OutOfMemoryError if memory_lines else EngineError
    return kind(f"{what}: {line or 'its log is empty'} (log: {log_path})")


def is_out_of_memory(error_line: str) -> bool:
    """Whether an error line says that memory ran out."""
    return _OUT_OF_MEMORY.search(error_line) is not None


def hide_secrets(log_path: Path, start: int) -> None:
    """Replaces the secrets in a log from byte `start` on: servers print the arguments they were started with."""
    with contextlib.suppress(OSError), log_path.open("r+b") as file:
        file.seek(start)
        text = file.read().decode(errors="surrogateescape")
        if (hidden := redacted(text)) != text:
            file.seek(start)
            file.truncate()
            file.write(hidden.encode(errors="surrogateescape"))


def is_port_taken(error_line: str) -> bool:
    """Whether an error line says that another program listens on the port."""
    return _PORT_TAKEN.search(error_line) is not None


def one_line(text: str) -> str:
    """Text from outside as one printable line of at most 300 characters."""
    return _printable(text)[:MOST_CHARACTERS]


def _printable(text: str) -> str:
    return " ".join(printable(_COLOURS.sub("", redacted(text))).split())


def _without_prefix(line: str) -> str:
    return (_PREFIX.sub("", line) or line)[:MOST_CHARACTERS]


def _lines(log_path: Path, start: int) -> Sequence[str]:
    try:
        with log_path.open("rb") as file:
            file.seek(max(start, file.seek(0, 2) - MOST_READ_BYTES))
            text = file.read(MOST_READ_BYTES).decode(errors="replace")
    except OSError:
        return []
    plain = (_printable(line) for line in text.splitlines())
    return [line for line in plain if line]
