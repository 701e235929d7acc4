"""What a check of a target with its drafts found: plain records, so that a report shows them without loading a model.

How they were found out these records must not know.
"""

from dataclasses import asdict, dataclass
from typing import Any

from profiles.models.footprint import Footprint


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
    need: Footprint | None
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
    need: Footprint
    free_bytes: int
    drafts: tuple[DraftCheck, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are cached at the batch and context asked for."""
        return self.batch_size * self.context_length

    def to_json(self) -> dict[str, Any]:
        """Lists, objects, strings, numbers and None only; every `need` tells its `total_bytes` too."""
        raw = asdict(self)
        needs = (self.need, *(draft.need for draft in self.drafts))
        for told, need in zip((raw, *raw["drafts"]), needs, strict=True):
            if need is not None:
                told["need"]["total_bytes"] = need.total_bytes(self.num_tokens)
        return raw
