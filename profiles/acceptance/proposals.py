"""The acceptance of proposals that an engine or a look-up made at every position of a text."""

from collections.abc import Mapping, Sequence

from profiles.records.core import Draft, Prompt
from profiles.records.evidence import LookupTrace


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
