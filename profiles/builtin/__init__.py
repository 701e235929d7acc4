"""Names and folders of the models and prompts that ship, and the mark of names that a bundle brought.

Standard library only.
"""

from pathlib import Path

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent
TARGET = f"{BUILTIN}target"
DRAFTS = tuple(BUILTIN + name for name in ("draft-general", "draft-code", "draft-prose", "draft-deep"))
GGUF_MODELS = (TARGET, f"{BUILTIN}draft-general")  # also as float32 GGUF, for llama.cpp
ALL_PROMPTS = f"{BUILTIN}all"
IMPORTED = "imported:"  # before the last part of another machine's path
IMPORTED_MARKS = (IMPORTED, "carried:")  # stores written before 0.6.0 have the second


def replace_mark(name: str, text: str = "") -> str:
    """`name` with `text` in place of the mark of an imported model, if it has one."""
    for mark in IMPORTED_MARKS:
        name = name.replace(mark, text)
    return name
