"""What engines do differently, as data: how times are read, how a request ends, what is counted, what can be trusted.

Knows records only; every adapter states its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from profiles.terms import Draft, DraftKind, Setup, Workload

SERVED_KINDS: tuple[DraftKind, ...] = ("model", "ngram", "native")  # what serving engines draft with
Times = Literal["steps", "rounds"]
Change = Literal["in place", "restart"]
Batching = Literal["padded", "continuous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """An engine's ways, stated where it is adapted and asked for wherever they matter.

    `times`: the target's and the drafts' steps are timed apart, or only whole rounds. `past_end`: a round drafts its
    full length although the output has less room, and counts what it accepts beyond. `batching`: in a padded batch
    every row of a round costs what the widest does, a row that is done too, and rows are prefilled one after another;
    in a continuous one a row costs its own tokens and rows that come in together are prefilled in one step, so that a
    load is kept up with requests that nobody asked for until the last one of interest is done. `num_drafts`: what the
    engine's own counter of drafts counts. `traced_kinds`: drafts whose acceptance it tells over a trace; other kinds
    are really run at every length. `keeps_history`: methods whose pool outlives a request, so that runs depend on what
    ran before. `sampled_objection`: why sampled speculation is not to be trusted in this version, None where it is.
    `drops_short`: a look-up drafts nothing where it may not draft as many tokens as its match has. `origin`: whose
    arithmetic traces are; empty is our own engine's.
    """

    name: str
    times: Times
    past_end: bool
    batching: Batching
    num_drafts: Literal["rounds", "rounds that proposed"]
    draft_kinds: tuple[DraftKind, ...]
    traced_kinds: tuple[DraftKind, ...]
    length_change: Change
    keeps_history: tuple[str, ...] = ()
    sampled_objection: str | None = None
    drops_short: bool = False
    origin: str = ""

    def traces(self, draft: Draft) -> bool:
        """Whether a draft is traced and timed; others are only run."""
        return draft.kind in self.traced_kinds

    def timed(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """Of these drafts the ones that are."""
        return tuple(draft for draft in drafts if self.traces(draft))

    def drafts_with(self, setup: Setup) -> bool:
        """Whether a setup can propose anything at all."""
        draft = setup.draft
        if draft is None or draft.min_match is None or not self.drops_short:
            return draft is not None
        return setup.length >= draft.min_match

    def objection(self, workload: Workload, *, drafting: bool) -> str | None:
        """Why a workload cannot be run here, or None."""
        if drafting and workload.temperature > 0.0 and self.sampled_objection is not None:
            return f"temperature {workload.temperature:g} with a draft: {self.sampled_objection}"
        return None


TORCH = Properties(
    name="torch",
    times="steps",
    past_end=False,
    batching="padded",
    num_drafts="rounds",
    draft_kinds=("model", "ngram", "early_exit", "composite"),
    traced_kinds=("model", "ngram", "early_exit", "composite"),
    length_change="in place",
)
