"""What a check of a target with its drafts found: plain records, so that a report shows them without loading a model.

Bytes are told at the batch and context asked for. How they were found out these records must not know.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory in bytes: weights once, keys and values per token of each sequence, and both at the asked shape."""

    weight_bytes: int
    cache_bytes_per_token: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """Acceptance over a few short outputs at one speculation length; None where no round was drafted.

    `acceptance_rate`: accepted / drafted. `acceptance_length`: 1 + accepted / rounds.
    """

    num_prompts: int
    num_tokens: int
    length: int
    acceptance_rate: float | None
    acceptance_length: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheck:
    """One draft: `problem` says why it cannot be used as asked; what could not be found out is None.

    `max_positions` is None for a draft without a model. `need` is what it adds to the target's.
    """

    name: str
    same_tokens: bool | None
    max_positions: int | None
    need: Need | None
    glance: Glance | None
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """A target and its drafts; `free_bytes` is what the device had before anything was loaded."""

    target: str
    dtype: str
    device: str
    batch_size: int
    context_length: int
    max_positions: int
    need: Need
    free_bytes: int
    drafts: tuple[DraftCheck, ...]
    notes: tuple[str, ...]
