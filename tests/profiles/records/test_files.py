"""Files are replaced in one step or stay as they were, and only files are read or replaced."""

import os
from pathlib import Path

import pytest

from profiles.records.files import open_file, write_atomically


def test_a_file_is_replaced(tmp_path: Path) -> None:
    """The new content is there, and nothing beside it."""
    for data in (b"old", b"new"):
        write_atomically(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails, or a user who interrupts, leaves no half-written file."""
    (tmp_path / "a").write_bytes(b"old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(descriptor: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_only_files_are_written_and_read(tmp_path: Path) -> None:
    """An empty path, a folder, a pipe and a device are refused at once, and stay what they are."""
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (Path(""), "Is a directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "Not a regular file"),
        (Path("/dev/null"), "Not a regular file"),
    ):
        with pytest.raises(OSError, match=reason):
            write_atomically(path, b"")
        with pytest.raises(OSError, match=reason):
            open_file(path)
    assert (tmp_path / "pipe").is_fifo()
    assert not Path("/dev/null").is_file()
