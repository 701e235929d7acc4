"""Where a model of safetensors is kept as GGUF once it was written; a look-up asks it, so it loads nothing heavy."""

from pathlib import Path

import platformdirs

from profiles.records.core import digest_of

FORMAT = 1  # raised when the same model would be written otherwise


def gguf_place(folder: Path, digest: str, dtype: str) -> Path:
    """The file for the model in `folder` with this digest of weights and config; its other texts count too."""
    others = sorted({*folder.glob("*.json"), *folder.glob("*.jinja")})
    told = [[file.name, file.read_text(encoding="utf-8", errors="replace")] for file in others]
    return platformdirs.user_cache_path("draftpick") / "gguf" / f"{digest_of([FORMAT, digest, told])}-{dtype}.gguf"
