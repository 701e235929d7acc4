"""Writes a choice as the YAML file TensorRT-LLM's LLM API takes (`--config`).

Keys and versions were read in `tensorrt_llm/llmapi/llm_args.py` of the 1.2 series and of the 1.3 candidates after PR
#10860, and in the reference pages of 1.3.0rc27, 1.3.0rc29 and 1.4.0rc1; no engine of it was run.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from profiles.records.core import Setup
from tuner.export.schedule import Range, as_scheduled, ranges_of
from tuner.export.select import (
    Engine,
    comment,
    joined,
    kind_objection,
    label_of,
    made,
    one_length,
    pick,
    place_of,
    refused,
    title,
    weights_objection,
)
from tuner.export.types import Deployment, Export


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """What holds from version `first` on: what a schedule's keys mean, and the key of the draft's weights."""

    first: str
    schedule: Literal["starts", "ends", "unknown"]
    model_key: str


SPELLINGS = (
    Spelling(first="1.2.0", schedule="starts", model_key="speculative_model_dir"),  # {1: 4, 4: 2, 8: 0}
    # PR #10860 changed the meaning in one of these
    Spelling(first="1.3.0.dev0", schedule="unknown", model_key="speculative_model_dir"),
    Spelling(first="1.3.0rc27", schedule="ends", model_key="speculative_model"),  # {4: 4, 8: 2, 32: 1}, then 0
)
KEYS = (
    "decoding_type",
    "max_draft_len",
    "speculative_model",
    "speculative_model_dir",
    "max_matching_ngram_size",
    "draft_len_schedule",
)
STALE = "after drafting nothing, acceptance stays low (TensorRT-LLM PR #16888): keep max_batch_size at or under {batch}"


def emit(deployment: Deployment, engine: Engine) -> Export:
    """A YAML document with `speculative_config`, or a note on why there is none."""
    known = [one for one in SPELLINGS if Version(engine.version) >= Version(one.first)]
    if not known:
        return refused([f"{engine.name} is not known: from {SPELLINGS[0].first} on it is"])

    def objection(setup: Setup) -> str | None:
        return (
            kind_objection(setup, engine)
            or weights_objection(deployment.target, setup, engine)
            or _revision_objection(setup)
        )

    setup, notes = pick(deployment, engine, objection)
    if setup is None or setup.draft is None:
        return refused(notes)
    ranges = ranges_of(deployment, setup.draft, objection)
    schedule, said = _schedule(ranges, deployment.choice.batch_size, known[-1], engine)
    if schedule or len(ranges) == 1:
        setup, shorter = as_scheduled(setup, ranges, deployment.choice.batch_size)
        said = shorter + said
    notes += said
    if not schedule:
        notes.append(one_length(deployment, setup, "max_batch_size", alike=len(ranges) == 1))
    notes += _caveats(deployment, setup)
    text = "\n".join(_lines(deployment, engine, setup, notes) + _yaml(setup, schedule, known[-1]))
    return made(deployment, engine, setup, text + "\n", notes)


def _revision_objection(setup: Setup) -> str | None:
    model = setup.draft.model if setup.draft is not None else None
    if model is None or model.revision is None:
        return None
    return f"TensorRT-LLM is told no revision: download {model.revision} of {model.name} and measure that directory"


def _schedule(
    ranges: tuple[Range, ...], asked: int, spelling: Spelling, engine: Engine
) -> tuple[dict[int, int], list[str]]:
    """TensorRT-LLM's mapping, empty where one length holds or the version cannot be told; and what to say about it.

    It ends with the first stretch of batches that draft: keys that are upper bounds have no word for a hole in it.
    """
    if len(ranges) < 2:
        return {}, []
    if spelling.schedule == "unknown":
        return {}, [f"what draft_len_schedule means in {engine.name} is not known: one length is set for all batches"]
    drafting = list(itertools.takewhile(lambda one: one.length > 0, ranges))
    if not drafting or drafting[0].length != max(one.length for one in drafting):
        return {}, ["draft_len_schedule must begin with the longest draft: one length is set for all batches"]
    last = drafting[-1].last
    if asked > last:
        return {}, [f"draft_len_schedule would end at batch {last}: one length is set for all batches"]
    left_out = [f"{one.first} to {one.last}" for one in ranges[len(drafting) :] if one.length]
    notes = [f"batches {', '.join(left_out)} draft nothing: plain decoding lies before them"] if left_out else []
    notes.append(STALE.format(batch=last))
    if spelling.schedule == "ends":
        return {one.last: one.length for one in drafting}, notes
    return {one.first: one.length for one in drafting} | {last + 1: 0}, notes


def _caveats(deployment: Deployment, setup: Setup) -> list[str]:
    assert setup.draft is not None
    if setup.draft.kind == "ngram" and setup.draft.min_match != 1:
        return [
            "TensorRT-LLM also looks up single tokens; "
            f"the choice was measured with matches of {setup.draft.min_match} or more"
        ]
    if setup.draft.kind == "model" and deployment.choice.temperature > 0.0:
        return ["the choice was measured with rejection sampling of sampled drafts; TensorRT-LLM's rule may differ"]
    return []


def _lines(deployment: Deployment, engine: Engine, setup: Setup, notes: list[str]) -> list[str]:
    said = joined(notes)
    head = [title(deployment, setup, label_of(deployment, engine.form, setup)), comment(f"for {engine.name}")]
    return head if said is None else [*head, comment(said)]


def _yaml(setup: Setup, schedule: dict[int, int], spelling: Spelling) -> list[str]:
    """Texts are quoted as JSON does, which YAML reads alike."""
    draft = setup.draft
    assert draft is not None
    longest = max(schedule.values(), default=setup.length)
    values: dict[str, object] = {"decoding_type": "NGram" if draft.model is None else "Draft_Target"}
    values["max_draft_len"] = longest
    if draft.model is None:
        values["max_matching_ngram_size"] = draft.max_match
    else:
        values[spelling.model_key] = place_of(draft.model)
    lines = ["speculative_config:", *(f"  {key}: {json.dumps(value)}" for key, value in values.items())]
    if schedule:
        pairs = ", ".join(f"{batch}: {length}" for batch, length in schedule.items())
        lines.append(f"  draft_len_schedule: {{{pairs}}}")
    return lines
