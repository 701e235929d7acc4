"""Prompt look-up (an n-gram draft): what it proposes, and its acceptance over a target trace."""

from profiles.acceptance.ngram_index import NgramIndex
from profiles.acceptance.proposals import acceptance_of
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
