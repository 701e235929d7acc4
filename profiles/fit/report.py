"""The result of `check`, as plain records that can be shown without loading a model."""

from dataclasses import asdict, dataclass
from typing import Any

from profiles.models.footprint import Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickAcceptance:
    """Acceptance over a few short outputs at one speculation length; None where no round was drafted."""

    num_prompts: int
    num_tokens: int
    length: int
    acceptance_rate: float | None  # accepted / drafted tokens
    acceptance_length: float | None  # 1 + accepted tokens / rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheck:
    """One draft; what is unknown is None."""

    name: str
    same_tokens: bool | None
    max_positions: int | None  # None for a draft without a model
    need: Footprint | None  # what the draft adds to the target's memory
    quick_acceptance: QuickAcceptance | None
    problem: str | None  # why it cannot be used


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A target and its drafts; `free_bytes` is the device's free memory before anything was loaded."""

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
        """Tokens cached at the batch and context of the report."""
        return self.batch_size * self.context_length

    def to_json(self) -> dict[str, Any]:
        """JSON values only; every `need` has its `total_bytes`, and quick acceptance keeps its key of 0.5.0."""
        raw = asdict(self)
        for draft in raw["drafts"]:
            draft["glance"] = draft.pop("quick_acceptance")
        needs = (self.need, *(draft.need for draft in self.drafts))
        for entry, need in zip((raw, *raw["drafts"]), needs, strict=True):
            if need is not None:
                entry["need"]["total_bytes"] = need.total_bytes(self.num_tokens)
        return raw
