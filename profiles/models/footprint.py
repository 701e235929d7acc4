"""Memory in bytes: what a model takes, and the unit it is told in. Standard library only."""

from dataclasses import dataclass

from profiles.records.draft_spec import MAX_LENGTH

GIB = 2**30
SPARE_SLOTS = MAX_LENGTH + 2  # beyond a context: the longest speculation length, and the round's own tokens
SLOTS_STEP = 64  # attention kernels on a GPU want rows of even lengths


def cache_slots(context_length: int) -> int:
    """Tokens a row's cache has room for when it decodes contexts of that length; one of them takes padding."""
    return -(-(context_length + SPARE_SLOTS + 1) // SLOTS_STEP) * SLOTS_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes a model takes: its weights once, and keys and values for every token of every sequence."""

    weight_bytes: int
    cache_bytes_per_token: int

    def total_bytes(self, num_tokens: int) -> int:
        """With `num_tokens` (batch times context) cached."""
        return self.weight_bytes + num_tokens * self.cache_bytes_per_token
