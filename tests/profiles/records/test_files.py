"""Files are replaced in one step or stay as they were, and only files are read or replaced."""

import os
from pathlib import Path

import pytest

from profiles.records.draft_spec import parse_draft
from profiles.records.errors import InputError
from profiles.records.files import absolute_name, open_file, user_folder, write_atomically


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


def test_mode_and_link_stay(tmp_path: Path) -> None:
    """A private file stays private, and a link still leads to the file."""
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o600)
    (tmp_path / "link").symlink_to("a")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "b", b"new")
    finally:
        os.umask(umask)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """The name of the temporary file cannot be foreseen."""
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to("victim")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_what_lies_on_disk_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model has one name, however it is spelled; hub ids stay."""
    (tmp_path / "thin").mkdir()
    monkeypatch.chdir(tmp_path)
    for spelling in ("thin", "thin/", "./thin", f"{tmp_path}/thin", "../" + tmp_path.name + "/thin"):
        assert absolute_name(spelling) == str(tmp_path / "thin")
        assert parse_draft(spelling).name == str(tmp_path / "thin")
        assert parse_draft(f"ngram+{spelling}").path == str(tmp_path / "thin")
    (tmp_path / "thin" / "blob").touch()
    (tmp_path / "link").symlink_to("thin")
    (tmp_path / "link.gguf").symlink_to("thin/blob")
    assert absolute_name("link") == absolute_name("link/../link/") == str(tmp_path / "thin")
    assert absolute_name("link/blob") == str(tmp_path / "thin" / "blob")
    assert absolute_name("link.gguf") == str(tmp_path / "link.gguf")
    assert absolute_name("owner/name") == "owner/name"
    assert absolute_name("") == ""


def test_a_user_without_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's arbitrary user has no line in the password file."""

    def fail() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_data_path", lambda name: fail())
    with pytest.raises(InputError, match=r"no home directory for the data folder .*; set HOME, or name a --store"):
        user_folder("data")
