"""A choice as the YAML file that TensorRT-LLM's LLM API takes (`--config`). Unverified: no TensorRT-LLM was run on it.

Keys and versions are those of `tensorrt_llm/llmapi/llm_args.py` of the 1.2 series and of the 1.3 candidates after PR
#10860, and of the reference pages of 1.3.0rc27, 1.3.0rc29 and 1.4.0rc1.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from profiles.engines import rules
from profiles.engines.releases import EngineRelease
from profiles.records.core import Setup
from tuner.export.schedule import Range, as_scheduled, ranges_of
from tuner.export.select import Deployment, Export, Pick, comment, one_length_note, title


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySet:
    """What holds from version `first` on: what a schedule's keys mean, and the key of the draft's weights."""

    first: str
    schedule: Literal["starts", "ends", "unknown"]
    model_key: str


KEY_SETS = (
    KeySet(first="1.2.0", schedule="starts", model_key="speculative_model_dir"),  # {1: 4, 4: 2, 8: 0}
    # PR #10860 changed the meaning in one of these
    KeySet(first="1.3.0.dev0", schedule="unknown", model_key="speculative_model_dir"),
    KeySet(first="1.3.0rc27", schedule="ends", model_key="speculative_model"),  # {4: 4, 8: 2, 32: 1}, then 0
)
FIRST = KEY_SETS[0].first
STALE = "after drafting nothing, acceptance stays low (TensorRT-LLM PR #16888): keep max_batch_size at or under {batch}"


def objection(deployment: Deployment, setup: Setup, release: EngineRelease) -> str | None:
    model = setup.draft.model if setup.draft is not None else None
    reason = rules.objection(deployment.target, setup, release)
    if reason is None and model is not None and model.revision is not None:
        return f"TensorRT-LLM takes no revision: download {model.revision} of {model.name} and measure that directory"
    return reason


def write(pick: Pick) -> Export:
    deployment, release, setup = pick.deployment, pick.release, pick.setup
    draft = setup.draft
    assert draft is not None
    key_set = [keys for keys in KEY_SETS if not release.is_before(keys.first)][-1]
    ranges = ranges_of(deployment, draft, pick.objection)
    schedule, schedule_notes = _schedule(ranges, deployment.choice.batch_size, key_set, release)
    notes: list[str] = []
    if schedule or len(ranges) == 1:
        setup, notes = as_scheduled(setup, ranges, deployment.choice.batch_size)
    notes += schedule_notes
    if not schedule:
        notes.append(one_length_note(deployment, setup, "max_batch_size", all_alike=len(ranges) == 1))
    if draft.kind == "ngram" and draft.min_match != 1:
        matches = f"the choice was measured with matches of {draft.min_match} or more"
        notes.append(f"TensorRT-LLM also looks up single tokens; {matches}")
    if draft.kind == "model" and deployment.choice.temperature > 0.0:
        notes.append(
            "the choice was measured with rejection sampling of sampled drafts; TensorRT-LLM's rule may differ"
        )
    head = [title(deployment, release.engine, setup), comment(f"for {release.name}")]
    head.append(comment("; ".join([*pick.notes, *notes])))
    lines = [line for line in head if line != "# "] + _yaml(setup, schedule, key_set)
    return pick.export("\n".join(lines) + "\n", notes, setup)


def _schedule(
    ranges: Sequence[Range], batch_size: int, key_set: KeySet, release: EngineRelease
) -> tuple[dict[int, int], list[str]]:
    """TensorRT-LLM's mapping and notes; empty where one length holds, or what the version means is not known.

    It ends with the first stretch of batches that draft: keys that are upper bounds cannot express a gap.
    """
    if len(ranges) < 2:
        return {}, []
    if key_set.schedule == "unknown":
        return {}, [f"what draft_len_schedule means in {release.name} is not known: one length is set for all batches"]
    drafting = list(itertools.takewhile(lambda stretch: stretch.length > 0, ranges))
    if not drafting or drafting[0].length != max(stretch.length for stretch in drafting):
        return {}, ["draft_len_schedule must begin with the longest draft: one length is set for all batches"]
    last = drafting[-1].last
    if batch_size > last:
        return {}, [f"draft_len_schedule would end at batch {last}: one length is set for all batches"]
    beyond = [f"{stretch.first} to {stretch.last}" for stretch in ranges[len(drafting) :] if stretch.length]
    notes = [f"batches {', '.join(beyond)} draft nothing: plain decoding lies before them"] if beyond else []
    notes.append(STALE.format(batch=last))
    if key_set.schedule == "ends":
        return {stretch.last: stretch.length for stretch in drafting}, notes
    return {stretch.first: stretch.length for stretch in drafting} | {last + 1: 0}, notes


def _yaml(setup: Setup, schedule: dict[int, int], key_set: KeySet) -> list[str]:
    """Values are written as JSON, which YAML reads alike."""
    draft = setup.draft
    assert draft is not None
    values: dict[str, object] = {
        "decoding_type": "NGram" if draft.model is None else "Draft_Target",
        "max_draft_len": max(schedule.values(), default=setup.length),
    }
    if draft.model is None:
        values["max_matching_ngram_size"] = draft.max_match
    else:
        values[key_set.model_key] = rules.model_path(draft.model)
    lines = ["speculative_config:", *(f"  {key}: {json.dumps(value)}" for key, value in values.items())]
    if schedule:
        pairs = ", ".join(f"{batch}: {length}" for batch, length in schedule.items())
        lines.append(f"  draft_len_schedule: {{{pairs}}}")
    return lines
