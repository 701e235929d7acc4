"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny random model directory of three layers per architecture; tests that change files copy one first."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.write_model(root / name, name, num_layers=3) for name in tiny.ARCHITECTURES}


@pytest.fixture(scope="session", autouse=True)
def _no_repeats() -> Iterator[None]:
    """Timed units are not repeated on a busy machine: tests look at tokens and records, not at seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("profiles.engine.MAX_REPEATS", 0)
        yield
