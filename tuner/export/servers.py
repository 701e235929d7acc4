"""A choice as arguments of SGLang's server and of llama.cpp's `llama-server`."""

import shlex

from profiles.engines.llamacpp import flags as llamacpp_flags
from profiles.engines.sglang import flags as sglang_flags
from tuner.export.select import Export, Pick, one_length_note, sampling_notes


def write_sglang(pick: Pick) -> Export:
    """One line of arguments for `python -m sglang.launch_server`."""
    notes = [
        one_length_note(pick, "--max-running-requests"),
        "SGLang sets --max-running-requests to 48 for speculative decoding unless it is given",
        *sampling_notes(pick),
    ]
    if pick.draft.kind == "ngram":
        sizes = f"{pick.draft.min_match} to {pick.draft.max_match} tokens"
        notes.append(f"SGLang's NGRAM looks up a trie of past text: the measured matches of {sizes} have no flag")
    return pick.export(shlex.join(sglang_flags.args_for(pick.setup)) + "\n", notes)


def write_llamacpp(pick: Pick) -> Export:
    """One line of arguments for `llama-server`."""
    draft, deployment = pick.draft, pick.deployment
    notes = []
    if deployment.engine != "llamacpp" and draft.kind == "ngram":
        # with at least one match of the smallest size a round drafts, here as in the measured look-up
        notes.append(
            f"llama.cpp looks up the latest {draft.min_match} tokens alone; the choice was measured with the longest "
            f"match of {draft.max_match} down to {draft.min_match}, the earliest in the text"
        )
    elif deployment.engine != "llamacpp" and deployment.choice.temperature > 0.0:
        notes.append("llama.cpp drafts greedily, the choice was measured with sampled drafts")
    notes.append(one_length_note(pick, "--parallel"))
    return pick.export(shlex.join(llamacpp_flags.args_for(pick.setup)) + "\n", notes)
