"""What an export hands back; on its own so that the engines' modules and the package that joins them can share it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`text` is ready for a file, empty where the engine cannot or need not be told; `note` says why, or a caveat."""

    text: str
    note: str | None = None
