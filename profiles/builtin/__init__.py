"""How what ships is named on the command line, where it lies, and how a name from elsewhere is marked.

Standard library only; it reads nothing.
"""

from pathlib import Path

BUILTIN = "builtin:"
IMPORTED = "carried:"  # before the last part of another machine's path, which a bundle brought
FAMILY_FOLDER = Path(__file__).parent
TARGET = f"{BUILTIN}target"
DRAFTS = tuple(BUILTIN + name for name in ("draft-general", "draft-code", "draft-prose", "draft-deep"))
ALL_PROMPTS = f"{BUILTIN}all"
