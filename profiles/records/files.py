"""Atomic writes, opening of regular files only, and the user's folders. Standard library only."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

NOT_A_FILE = "Not a regular file"


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file in one step: readers see the old or the new content.

    Raises:
        OSError: Also for an empty path, a directory, or something else that is no regular file.
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
    """Opens a regular file to read, without waiting for pipes and devices. Raises OSError."""
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
