"""Whether a draft's embeddings have the target's size: engines compare that number, though the tokens are the same.

A family's models are padded differently (151,936 and 152,064 rows for the same tokens); draftpick measures such a pair,
vLLM, SGLang and transformers end with an error. Known for directories alone: a hub id is not downloaded to find out.
"""

import json
from pathlib import Path

from profiles.records.core import Model, Setup
from tuner.export.select import Engine, place_of


def vocabulary_objection(target: Model, setup: Setup, engine: Engine) -> str | None:
    draft = setup.draft.model if setup.draft is not None else None
    ours, theirs = size_of(target), None if draft is None else size_of(draft)
    if ours is None or theirs is None or ours == theirs:
        return None
    return f"{engine.title} needs equal vocabulary sizes, and the target has {ours}, the draft {theirs}"


def size_of(model: Model) -> int | None:
    """`vocab_size` of the directory's config.json, or of the text part of it; None where that cannot be told."""
    try:
        config = json.loads((Path(place_of(model)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts = (config, config.get("text_config")) if isinstance(config, dict) else ()
    sizes = (part.get("vocab_size") for part in parts if isinstance(part, dict))
    return next((size for size in sizes if isinstance(size, int)), None)
