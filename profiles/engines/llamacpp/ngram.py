"""What llama.cpp's `ngram-simple` proposes along a text: a look-up of one size of n-gram, at its latest place.

The rule is `common_ngram_simple_draft` of llama.cpp (common/ngram-map.cpp): the tokens that followed the latest earlier
occurrence of the last n, and nothing where fewer than n of them are known, nor in a text of no more than n + 2 tokens
beside those it may draft. Knows nothing of servers.
"""

from profiles.records.core import Draft, Prompt
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import LookupTrace, TargetTrace


def check(draft: Draft) -> int:
    """The size of its n-grams. Raises InputError: it has several sizes, of which llama.cpp looks up one."""
    if draft.max_match is None or draft.max_match != draft.min_match:
        raise InputError(f"draft {draft.name}: llama.cpp looks up one size of n-gram; allowed are equal max and min")
    return draft.max_match


def trace_lookup(draft: Draft, prompt: Prompt, trace: TargetTrace, max_length: int) -> LookupTrace:
    """What is proposed for a round at every position of the trace, and how much of it is kept.

    For every length from n to `max_length`; llama.cpp drafts nothing for lengths under n. Raises: InputError as
    `check`. EngineError: the text is so short somewhere that llama.cpp drafts for some of these lengths only.
    """
    size = check(draft)
    text = [*prompt.token_ids, *trace.token_ids]
    latest: dict[tuple[int, ...], int] = {}
    seen = 1  # the place of the next n-gram to note; llama.cpp never finds the one at 0
    proposed, kept = [0], [0]
    for start in range(1, len(trace.token_ids)):
        known = len(prompt.token_ids) + start - 1  # the last token is looked up but not yet in the text
        while seen < known - size:
            latest[tuple(text[seen : seen + size])] = seen
            seen += 1
        place = latest.get(tuple(text[known + 1 - size : known + 1]))
        tokens = [] if place is None else text[place + size : min(place + size + max_length, known)]
        longest = known - size - 2  # the greatest length that drafts in so short a text
        if len(tokens) < size or longest < size:
            tokens = []
        elif longest < max_length:
            raise EngineError(
                f"draft {draft.name}: in a text of {known + 1} tokens llama.cpp drafts for lengths up to {longest} "
                f"alone; for lengths up to {max_length} prompts of {size + max_length + 2} tokens are needed"
            )
        emitted = trace.token_ids[start : start + len(tokens)]
        pairs = zip(tokens, emitted, strict=False)
        proposed.append(len(tokens))
        kept.append(next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), len(emitted)))
    return LookupTrace(
        prompt_digest=prompt.digest,
        draft_digest=draft.digest,
        max_length=max_length,
        proposed=tuple(proposed),
        accepted=tuple(kept),
    )
