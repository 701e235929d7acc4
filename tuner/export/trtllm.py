"""A choice as the YAML file that TensorRT-LLM's LLM API takes (`--config`). Unverified: no TensorRT-LLM was run on it.

Keys are those of `tensorrt_llm/llmapi/llm_args.py` of the 1.2 series and of the reference pages of 1.3.0rc27, 1.3.0rc29
and 1.4.0rc1. Its `draft_len_schedule` changed its meaning between them and is not written: one length holds.
"""

import json

from profiles.engines import rules
from profiles.engines.releases import EngineRelease
from profiles.records.core import Setup
from tuner.export.select import Deployment, Export, Pick, comment, look_up_notes, one_length_note, sampling_notes, title

RENAMED = "1.3.0rc27"  # from here on the draft's weights have another key


def objection(deployment: Deployment, setup: Setup, release: EngineRelease) -> str | None:
    model = setup.draft.model if setup.draft is not None else None
    reason = rules.objection(deployment.target, setup, release)
    if reason is None and model is not None and model.revision is not None:
        return f"TensorRT-LLM takes no revision: download {model.revision} of {model.name} and measure that directory"
    return reason


def write(pick: Pick) -> Export:
    """Values are written as JSON, which YAML reads alike."""
    release, draft = pick.release, pick.draft
    notes = [one_length_note(pick, "max_batch_size"), *look_up_notes(pick), *sampling_notes(pick)]
    values: dict[str, object] = {
        "decoding_type": "Draft_Target" if draft.model else "NGram",
        "max_draft_len": pick.setup.length,
    }
    if draft.model is None:
        values["max_matching_ngram_size"] = draft.max_match
    else:
        key = "speculative_model_dir" if release.is_before(RENAMED) else "speculative_model"
        values[key] = rules.model_path(draft.model)
    head = [title(pick), comment(f"for {release.name}"), comment("; ".join([*pick.notes, *notes]))]
    lines = [*head, "speculative_config:", *(f"  {key}: {json.dumps(value)}" for key, value in values.items())]
    return pick.export("\n".join(lines) + "\n", notes)
