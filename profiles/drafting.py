"""What proposes tokens: a draft model (or the target's own first layers) and a look-up of n-grams in the text.

A drafter serves one sequence. It is handed the committed tokens at every round and finds out itself how far it is
behind; it never sees the target.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from profiles.cache import CachedModel
from profiles.sampling import Draws, draw, output_law
from profiles.terms import Draft, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Drafted tokens and the laws they were drawn from (tokens, vocabulary); None: the draft was certain."""

    token_ids: list[int]
    probs: torch.Tensor | None


class Drafter(Protocol):
    """Proposes tokens for one sequence."""

    def start(self, prompt_ids: tuple[int, ...]) -> None:
        """Takes in the prompt; part of the time to first token."""
        ...

    def propose(self, token_ids: list[int], asked: int, position: int) -> Proposal:
        """At most `asked` tokens to follow the committed `token_ids`; `position` is the next output position."""
        ...


class ModelDrafter:
    """A causal language model drafting token by token, greedily or from its law under the workload's sampling."""

    def __init__(
        self, model: PreTrainedModel, workload: Workload, draws: Draws | None, stop_below: float | None = None
    ) -> None:
        self._cached = CachedModel(model)
        self._workload = workload
        self._draws = draws
        self._stop_below = stop_below

    def start(self, prompt_ids: tuple[int, ...]) -> None:
        self._cached.step(list(prompt_ids), keep=1)

    def propose(self, token_ids: list[int], asked: int, position: int) -> Proposal:
        # All but the last committed token may be ingested already: what was kept of the last round was our own.
        self._cached.rollback(len(token_ids) - 1)
        pending = token_ids[self._cached.length :]
        proposed: list[int] = []
        laws: list[torch.Tensor] = []
        while len(proposed) < asked:
            logits = self._cached.step(pending, keep=1)
            # A round stops before a proposal is drawn, never after: dropping a drawn token would bend the output law.
            if self._stop_below is not None and float(torch.softmax(logits.float(), -1).max()) < self._stop_below:
                break
            if self._draws is None:
                token = int(logits[0].argmax())
            else:
                law = output_law(logits, self._workload)[0]
                token = draw(law, self._draws.draft[position + len(proposed)])
                laws.append(law)
            proposed.append(token)
            pending = [token]
        return Proposal(token_ids=proposed, probs=torch.stack(laws) if laws else None)


class NgramDrafter:
    """Prompt look-up: what followed the earliest occurrence of the longest matching suffix of the text.

    Lengths from `max_match` down to `min_match` are tried, the rule of transformers' prompt look-up. Each n-gram is
    indexed once, when the token after it is known, so a round costs a few dictionary reads however long the text.
    """

    def __init__(self, max_match: int, min_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._follower: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def start(self, prompt_ids: tuple[int, ...]) -> None:
        self._index(list(prompt_ids))

    def propose(self, token_ids: list[int], asked: int, position: int) -> Proposal:  # noqa: ARG002 -- the protocol's
        self._index(token_ids)
        for size in self._sizes:
            if size < len(token_ids):
                start = self._follower.get(tuple(token_ids[-size:]))
                if start is not None:
                    return Proposal(token_ids=token_ids[start : start + asked], probs=None)
        return Proposal(token_ids=[], probs=None)

    def _index(self, token_ids: list[int]) -> None:
        for follower in range(max(self._indexed, 1), len(token_ids)):
            for size in self._sizes:
                if size <= follower:
                    self._follower.setdefault(tuple(token_ids[follower - size : follower]), follower)
        self._indexed = len(token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """A draft that is ready to use: its record and, where it has one, its model."""

    draft: Draft
    model: PreTrainedModel | None

    def new_drafter(self, workload: Workload, draws: Draws | None, stop_below: float | None = None) -> Drafter:
        """A drafter for one sequence."""
        if self.model is not None:
            return ModelDrafter(self.model, workload, draws, stop_below)
        draft = self.draft
        assert draft.max_match is not None
        assert draft.min_match is not None
        return NgramDrafter(draft.max_match, draft.min_match)
