"""A choice as vLLM's `--speculative-config`."""

import json

from profiles.engines.vllm.flags import DRAFT_FEWER, SCHEDULE, TRACED, allowed_keys, speculative_config
from profiles.records.text import command
from tuner.export.schedule import Range, as_scheduled, claims_of, ranges_of
from tuner.export.select import Pick, Written, one_length_claims, one_length_note

LAST_BATCH = 65_536  # ends the last range; vLLM carries the last length on beyond it


def write(pick: Pick) -> Written:
    """One argument for `vllm serve`, with a schedule where the version has one."""
    deployment, release, setup = pick.deployment, pick.release, pick.setup
    draft = setup.draft
    assert draft is not None
    notes: list[str] = []
    ranges, allowed = ranges_of(deployment, draft, pick.objection), allowed_keys(release)
    if len(ranges) > 1 and SCHEDULE not in allowed:
        notes.append(f"{release.name} has no length per batch size")
    elif ranges:
        setup, notes = as_scheduled(setup, ranges, deployment.choice.batch_size)
    schedule = _schedule(ranges) if SCHEDULE in allowed else []
    longest = max((length for _, _, length in schedule), default=setup.length)
    config = speculative_config(draft, longest)
    # drafts were sampled where they were measured; vLLM drafts greedily unless it is told
    is_sampled = deployment.choice.temperature > 0.0 and deployment.engine != "vllm"
    if is_sampled and "model" in config:
        if "draft_sample_method" in allowed:
            config["draft_sample_method"] = "probabilistic"
        elif config["method"] == "draft_model":
            notes.append("this version drafts greedily, the choice was measured with sampled drafts")
    if schedule:
        config[SCHEDULE] = schedule
        claims = claims_of(setup, ranges, deployment)
    else:
        all_alike = len(ranges) == 1
        claims = one_length_claims(deployment, setup, all_alike=all_alike)
        notes.append(one_length_note(deployment, setup, "--max-num-seqs", all_alike=all_alike))
    if "model" in config and any(length == 0 for _, _, length in schedule):
        notes.append(
            "where the schedule says 0 the draft still reads what the target writes, which a server without a draft is "
            f"spared: slower than that there; {command('verify')} measures by how much"
        )
    shorter = {length for _, _, length in schedule} - {0, longest}
    if shorter and config["method"] not in DRAFT_FEWER and not release.is_before(TRACED[0]):
        notes.append(
            f"on a GPU this draft proposes {longest} tokens at every batch size, of which {min(shorter)} are verified: "
            "slower there than a server of that length (Model Runner V2)"
        )
    # a quote inside the JSON is written as an escape, so that the shell sees one plain quoted word
    text = json.dumps(config).replace("'", "\\u0027")
    return Written(text=f"--speculative-config '{text}'\n", setup=setup, notes=notes, claims=claims)


def _schedule(ranges: tuple[Range, ...]) -> list[list[int]]:
    """vLLM's ranges, with plain decoding beyond them; empty where one length holds for all measured batches.

    A range of 0 between two that draft stays: the draft still reads what the target writes there, so that later
    acceptance does not suffer (`llm_base_proposer.py` of 0.24.0 and 0.33.0).
    """
    if len(ranges) < 2:
        return []
    rows = [[stretch.first, stretch.last, stretch.length] for stretch in ranges]
    if rows[-1][2] > 0:
        rows.append([rows[-1][1] + 1, 0, 0])
    rows[-1][1] = LAST_BATCH
    return rows
