"""How what ships is named on the command line, and where it lies. Standard library only; it reads nothing."""

from pathlib import Path

BUILTIN = "builtin:"
CARRIED = "carried:"  # before the name of a model that came in a bundle and had a path where it was packed
FAMILY_FOLDER = Path(__file__).parent / "family"
TARGET = f"{BUILTIN}target"
DRAFTS = tuple(BUILTIN + name for name in ("draft-general", "draft-code", "draft-prose", "draft-deep"))
ALL_PROMPTS = f"{BUILTIN}all"
