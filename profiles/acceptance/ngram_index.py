"""Prompt look-up in one text. Standard library only: vLLM's worker loads this file too."""

from collections.abc import Sequence


class NgramIndex:
    """Prompt look-up in one text: what followed the earliest occurrence of the longest matching suffix.

    Lengths from `max_match` down to `min_match` are tried, the rule of transformers' prompt look-up. Each n-gram is
    indexed once, when the token after it is known, so a round costs a few dictionary reads however long the text.
    """

    def __init__(self, max_match: int, min_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._follower: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def look_up(self, token_ids: Sequence[int], limit: int) -> Sequence[int]:
        """At most `limit` tokens to follow the text, which is the last one or grew from it."""
        for follower in range(max(self._num_indexed, 1), len(token_ids)):
            for size in self._sizes:
                if size <= follower:
                    self._follower.setdefault(tuple(token_ids[follower - size : follower]), follower)
        self._num_indexed = len(token_ids)
        for size in self._sizes:
            if size < len(token_ids):
                start = self._follower.get(tuple(token_ids[-size:]))
                if start is not None:
                    return token_ids[start : start + limit]
        return []
