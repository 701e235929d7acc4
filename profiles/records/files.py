"""Atomic writes, opening of regular files only, and the user's folders. Standard library only."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO, Literal

from profiles.records.errors import InputError

NOT_A_FILE = "Not a regular file"


def absolute_name(name: str) -> str:
    """A model's name as it is stored: `real_path` of a file or directory, else (a hub id) the name itself."""
    return real_path(name) if name.strip() and os.path.exists(name) else name


def real_path(path: str) -> str:
    """The absolute path without links; a file that is a link keeps its name, of which the ending counts."""
    if os.path.isdir(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def user_folder(kind: Literal["data", "cache", "log"]) -> Path:
    """draftpick's folder of that kind in the user's home. Raises InputError where there is no home."""
    import platformdirs

    try:
        return Path(getattr(platformdirs, f"user_{kind}_path")("draftpick"))
    except RuntimeError as error:
        raise InputError(f"no home directory for the {kind} folder ({error}); set HOME, or name a --store") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file in one step: readers see the old or the new content. Mode and symbolic links stay.

    Raises OSError: also for an empty path, a directory, or something else that is no regular file.
    """
    if path.is_dir():  # an empty path is the working directory
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, NOT_A_FILE, str(path))
    path = path.resolve()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            if path.exists():
                shutil.copymode(path, file.name)
            else:
                mask = os.umask(0o077)  # can only be read by setting it
                os.umask(mask)
                os.chmod(file.name, 0o666 & ~mask)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    if os.name == "posix":  # the new name is on disk too
        descriptor = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


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
