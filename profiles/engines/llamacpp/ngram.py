"""What llama.cpp's `ngram-simple` proposes along a text: a look-up of one size of n-gram, at its latest occurrence.

The rule is `common_ngram_simple_draft` of llama.cpp (common/ngram-map.cpp): the tokens that followed the latest earlier
occurrence of the last n; nothing where fewer than n follow, nor in a text of at most n + 2 tokens beside the draft.
"""

from profiles.acceptance.ngram import acceptance_of
from profiles.records.core import Draft, Prompt
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import LookupTrace, TargetTrace


def match_size(draft: Draft) -> int:
    """The size of its n-grams. Raises InputError: it has several sizes, of which llama.cpp looks up one."""
    if draft.max_match is None or draft.max_match != draft.min_match:
        raise InputError(f"draft {draft.name}: llama.cpp looks up one size of n-gram; allowed are equal max and min")
    return draft.max_match


def trace_lookup(draft: Draft, prompt: Prompt, trace: TargetTrace, max_length: int) -> LookupTrace:
    """What a round at every position of the trace proposes, and how much of it is accepted.

    For every length from n to `max_length`; llama.cpp drafts nothing for lengths under n. Raises: InputError as
    `match_size`. EngineError: somewhere the text is so short that llama.cpp drafts for some of these lengths only.
    """
    size = match_size(draft)
    text = [*prompt.token_ids, *trace.token_ids]
    latest: dict[tuple[int, ...], int] = {}
    indexed = 1  # n-grams before it are in `latest`; llama.cpp never finds the one at 0
    proposals: dict[int, list[int]] = {}
    for start in range(1, len(trace.token_ids)):
        size_before = len(prompt.token_ids) + start - 1  # the last token is looked up but not yet in the text
        while indexed < size_before - size:
            latest[tuple(text[indexed : indexed + size])] = indexed
            indexed += 1
        match = latest.get(tuple(text[size_before + 1 - size : size_before + 1]))
        tokens = [] if match is None else text[match + size : min(match + size + max_length, size_before)]
        longest = size_before - size - 2  # the greatest length that drafts in so short a text
        if len(tokens) < size or longest < size:
            tokens = []
        elif longest < max_length:
            raise EngineError(
                f"draft {draft.name}: in a text of {size_before + 1} tokens llama.cpp drafts lengths up to {longest} "
                f"alone; for lengths up to {max_length} prompts of {size + max_length + 2} tokens are needed"
            )
        proposals[start] = tokens
    return acceptance_of(draft, prompt, trace.token_ids, proposals, size=len(trace.token_ids), max_length=max_length)
