"""A choice as arguments of SGLang's server and of llama.cpp's `llama-server`."""

import shlex

from profiles.engines.llamacpp import flags as llamacpp_flags
from profiles.engines.sglang import flags as sglang_flags
from tuner.export.select import Export, Pick, one_length_note


def write_sglang(pick: Pick) -> Export:
    """One line of arguments for `python -m sglang.launch_server`."""
    setup = pick.setup
    assert setup.draft is not None
    notes = [
        one_length_note(pick.deployment, setup, "--max-running-requests"),
        "SGLang sets --max-running-requests to 48 for speculative decoding unless it is given",
    ]
    if setup.draft.kind == "ngram":
        sizes = f"{setup.draft.min_match} to {setup.draft.max_match} tokens"
        notes.append(f"SGLang's NGRAM looks up a trie of past text: the measured matches of {sizes} have no flag")
    elif pick.deployment.choice.temperature > 0.0:
        notes.append("the choice was measured with rejection sampling of sampled drafts; SGLang's rule may differ")
    return pick.export(shlex.join(sglang_flags.args_for(setup)) + "\n", notes, setup)


def write_llamacpp(pick: Pick) -> Export:
    """One line of arguments for `llama-server`."""
    deployment, setup = pick.deployment, pick.setup
    assert setup.draft is not None
    notes = []
    if deployment.engine != "llamacpp" and setup.draft.kind == "ngram":
        # with at least one match of the smallest size a round drafts, here as in the measured look-up
        notes.append(
            f"llama.cpp looks up the latest {setup.draft.min_match} tokens alone; the choice was measured with the "
            f"longest match of {setup.draft.max_match} down to {setup.draft.min_match}, the earliest in the text"
        )
    elif deployment.engine != "llamacpp" and deployment.choice.temperature > 0.0:
        notes.append("llama.cpp drafts greedily, the choice was measured with sampled drafts")
    notes.append(one_length_note(deployment, setup, "--parallel"))
    text = shlex.join(llamacpp_flags.args_for(setup)) + "\n"
    return pick.export(text, notes, setup)
