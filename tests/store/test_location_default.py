"""The store of a checkout: the one that `make tune` fills, from every directory."""

from pathlib import Path

import pytest

from profiles.records.errors import StoreError
from store import location


def test_a_checkout_reads_the_store_of_make_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its `.draftpick` is there; without it, and in an installation, the user's data folder."""
    monkeypatch.delenv("DRAFTPICK_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(location, "__file__", str(tmp_path / "store" / "location.py"))
    user = location.store_location(None)
    assert tmp_path / "data" in Path(user).parents
    (tmp_path / ".draftpick").mkdir()
    assert location.store_location(None) == user
    (tmp_path / "tune.py").touch()
    assert location.store_location(None) == tmp_path / ".draftpick" / "evidence.db"
    monkeypatch.setenv("DRAFTPICK_STORE", str(tmp_path / "other"))
    assert location.store_location(None) == tmp_path / "other" / "evidence.db"


@pytest.mark.parametrize("url", ["sqlite:evidence.db", "sqlite://"])
def test_a_sqlite_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="sqlite:///FILE"):
        location.store_location(url)
