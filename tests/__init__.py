"""Tests of draftpick, in the folders of what they test; shared builders are in `tests.support`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
