"""Prompt look-up (an n-gram draft) over a target trace, and the acceptance of what is proposed along a text."""

from collections.abc import Mapping, Sequence

from profiles.acceptance.ngram_index import NgramIndex
from profiles.records.core import Draft, Prompt
from profiles.records.evidence import LookupTrace, TargetTrace


def trace_lookup(draft: Draft, prompt: Prompt, trace: TargetTrace, max_length: int) -> LookupTrace:
    """What prompt look-up proposes for a round at every position of the trace, and how much of it is accepted."""
    assert draft.max_match is not None
    assert draft.min_match is not None
    index, size = NgramIndex(draft.max_match, draft.min_match), len(trace.token_ids)
    proposals = {
        start: index.look_up([*prompt.token_ids, *trace.token_ids[:start]], max_length) for start in range(1, size)
    }
    return acceptance_of(draft, prompt, trace.token_ids, proposals, size=size, max_length=max_length)


def acceptance_of(
    draft: Draft,
    prompt: Prompt,
    emitted: Sequence[int],
    proposals: Mapping[int, Sequence[int]],
    *,
    size: int,
    max_length: int,
) -> LookupTrace:
    """The acceptance of a draft over the first `size` tokens of a text.

    A proposal is certain, so it is accepted exactly when it equals the emitted token, greedy or sampled.

    Args:
        emitted: The text that the proposals follow.
        proposals: The tokens proposed, by the number of tokens emitted before them; none where there is no entry.
    """
    accepted = []
    for start in range(size):
        pairs = zip(proposals.get(start, ()), emitted[start:], strict=False)
        agrees = [token == target for token, target in pairs]
        accepted.append((*agrees, False).index(False))
    return LookupTrace(
        prompt_digest=prompt.digest,
        draft_digest=draft.digest,
        max_length=max_length,
        proposed=tuple(len(proposals.get(start, ())) for start in range(size)),
        accepted=tuple(accepted),
    )
