"""Bytes that a model and its key/value cache take. Standard library only."""

from dataclasses import dataclass

from profiles.records.draft_spec import MAX_LENGTH

GIB = 2**30
SPARE_SLOTS = MAX_LENGTH + 2  # beyond a context: the longest speculation length, and the round's own tokens
SLOTS_STEP = 64  # attention kernels on a GPU want rows of even lengths


def cache_slots(context_length: int) -> int:
    """Slots allocated per cache row to decode contexts of `context_length`, one padding slot included."""
    return -(-(context_length + SPARE_SLOTS + 1) // SLOTS_STEP) * SLOTS_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a model's weights, and of keys and values per cached token."""

    weight_bytes: int
    cache_bytes_per_token: int

    def total_bytes(self, num_tokens: int) -> int:
        """Bytes with `num_tokens` (batch size times context) cached."""
        return self.weight_bytes + num_tokens * self.cache_bytes_per_token
