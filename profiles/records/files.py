"""Files replaced in one step, and files opened only when they are files. Standard library only.

What is in a file it must not know; an OSError is the caller's to word.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

NOT_A_FILE = "Not a regular file"


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file in one step: a reader sees the old one or the new one, and no draft of it is left behind.

    Raises OSError: also for an empty path, a directory, and what is there but no file.
    """
    if path.is_dir():  # an empty path is the working directory
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, NOT_A_FILE, str(path))
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read; a pipe or a device, which may never end, is not waited for. Raises OSError."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, NOT_A_FILE, str(path))
        return os.fdopen(descriptor, "rb")  # refuses a directory
    except OSError:
        os.close(descriptor)
        raise
