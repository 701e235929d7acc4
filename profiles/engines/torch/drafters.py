"""What proposes tokens for every row of a batch: a draft model, a look-up of n-grams in the text, or both.

A drafter reads the committed text of the rows and finds out itself how much of it its model has not seen. Shapes: B
rows, k proposed tokens of the row that proposes most, V tokens of the vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP, catch_up_width
from profiles.acceptance.ngram_index import NgramIndex
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.sampling import KeyedRandom, Proposal, draw, sampling_probs


def to_device(values: Sequence[object], device: torch.device) -> torch.Tensor:
    """Integers as a tensor; the host does not wait for a GPU to take them."""
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Text:
    """The committed tokens of every row, on the device for forwards and on the host for look-ups.

    `token_ids` (B, capacity) and `lengths` (B,) are the device's; `host[row]` is the same text as a list.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        self.token_ids = torch.zeros((num_rows, capacity), dtype=torch.long, device=device)
        self.lengths = torch.ones(num_rows, dtype=torch.long, device=device)
        self.host: list[list[int]] = [[0] for _ in range(num_rows)]

    @property
    def reach(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.host))

    def load(self, row: int, token_ids: list[int]) -> None:
        """From now on `row` holds this text."""
        self.host[row] = token_ids
        self.token_ids[row, : len(token_ids)] = to_device(token_ids, self.lengths.device)
        self.lengths[row].fill_(len(token_ids))  # assigning would wait for a GPU

    def clear(self, row: int) -> None:
        """The row is empty: it no longer widens what a step sees."""
        self.host[row] = [0]
        self.lengths[row].fill_(1)

    def last(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `width` tokens of every row and their positions, (B, width); positions below 0 are padding."""
        positions = self.lengths[:, None] + torch.arange(-width, 0, device=self.lengths.device)
        return self.token_ids.gather(1, positions.clamp_min(0)), positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A proposal, and what the draft model ran for it: steps, and the width of the first one; 0 and 0 without it.

    `matched`: the rows for which a look-up found something.
    """

    proposal: Proposal
    matched: tuple[bool, ...] = ()
    steps: int = 0
    first_width: int = 0


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch."""

    def start(self, row: int, text: Text) -> float:
        """Takes in a new row's text, a prompt and its first token; part of the time to first token.

        Returns the seconds that were spared (see `RowModel.prefill`).
        """
        ...

    def propose(self, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        """At most `limits[row]` tokens to follow each row; `positions` (B,) are the next output positions."""
        ...

    def settle(self, text: Text) -> None:
        """Notes how much of the last proposals was accepted; once after every round, as other drafts may follow."""
        ...


@functools.cache
def no_proposal(num_rows: int, device: torch.device) -> Proposal:
    """No row proposes; made once, because every plain round needs it."""
    counts = torch.zeros(num_rows, dtype=torch.long, device=device)
    return Proposal(token_ids=counts[:, None][:, :0], counts=counts, draft_probs=None, certain=counts == 0)


class ModelDrafter:
    """A causal language model drafting token by token, greedily or by sampling as the workload says.

    The first step of a round takes in the last tokens of every row, as many as the furthest row is behind, in one of
    a few widths; what a row had taken in already is written again with the same values. `stop_below` (see `Setup`)
    may change between rounds.
    """

    def __init__(self, model: RowModel, rng: KeyedRandom) -> None:
        self.stop_below: float | None = None
        self._model = model
        self._rng = rng
        self._taken_in = [0] * model.num_rows  # tokens of the row's text whose keys and values are cached
        self._last_proposal = [(0, 0)] * model.num_rows  # (text length then, proposed tokens taken in since)

    def start(self, row: int, text: Text) -> float:
        num_prompt = len(text.host[row]) - 1
        _, spared_s = self._model.prefill(text.token_ids[row : row + 1, :num_prompt], row)
        self.forget(row)
        self._taken_in[row] = num_prompt
        return spared_s

    def forget(self, row: int) -> None:
        """The row's text is another one from now on, of which nothing was taken in."""
        self._taken_in[row], self._last_proposal[row] = 0, (0, 0)

    def settle(self, text: Text) -> None:
        for row, (length, taken_in) in enumerate(self._last_proposal):
            if length > 0:
                accepted = len(text.host[row]) - length - 1
                self._taken_in[row] += min(taken_in, accepted)
                self._last_proposal[row] = (0, 0)

    def propose(self, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        tokens, token_positions, width = self._catch_up(text, limits)
        drafted: list[torch.Tensor] = []
        draft_probs: list[torch.Tensor] = []
        counts, limit = torch.zeros_like(positions), to_device(limits, positions.device)
        proposing, steps = limit > 0, 0
        for number in range(max(limits)):
            logits = self._model.step(tokens, token_positions, text.reach + number)[:, 0]  # (B, V)
            proposing, steps = proposing & (number < limit), steps + 1
            if self.stop_below is not None:
                # stopping before a token is drawn keeps the distribution; dropping a drawn token would bend it
                proposing = proposing & (torch.softmax(logits.float(), -1).amax(-1) >= self.stop_below)
                if not bool(proposing.any()):
                    break
            if self._rng.is_greedy:
                token = logits.argmax(-1)
            else:
                draft_probs.append(sampling_probs(logits, self._rng.workload))
                token = draw(draft_probs[-1], self._rng.at("draft", (positions + number)[:, None])[:, 0])
            counts = counts + proposing.long()
            drafted.append(token)
            tokens, token_positions = token[:, None], (text.lengths + number)[:, None]
        self._note_taken_in(text, limits, len(drafted), width)
        if not drafted:
            return Drafted(proposal=no_proposal(len(limits), positions.device), steps=steps, first_width=width)
        proposal = Proposal(
            token_ids=torch.stack(drafted, 1),
            counts=counts,
            draft_probs=torch.stack(draft_probs, 1) if draft_probs else None,
            certain=torch.zeros_like(proposing),
        )
        return Drafted(proposal=proposal, steps=steps, first_width=width)

    def _catch_up(self, text: Text, limits: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(tokens, positions, whole width) of the first step; what is too wide for one step is taken in before."""
        behind = [len(host) - taken_in for host, taken_in in zip(text.host, self._taken_in, strict=True)]
        width = catch_up_width(max(missing for missing, limit in zip(behind, limits, strict=True) if limit > 0))
        tokens, positions = text.last(width)
        for first in range(0, width - WIDEST_CATCH_UP, WIDEST_CATCH_UP):
            last = first + WIDEST_CATCH_UP
            self._model.step(tokens[:, first:last], positions[:, first:last], text.reach - (width - last))
        return tokens[:, -WIDEST_CATCH_UP:], positions[:, -WIDEST_CATCH_UP:], width

    def _note_taken_in(self, text: Text, limits: list[int], num_drafted: int, width: int) -> None:
        """A first step of `width` tokens has run; rows that were further behind got nothing from it."""
        for row, host in enumerate(text.host):
            if len(host) - self._taken_in[row] <= width:
                self._taken_in[row] = len(host)
            if limits[row] > 0:  # the width was made for these: none of them is behind
                self._last_proposal[row] = (len(host), max(0, num_drafted - 1))


class NgramDrafter:
    """Prompt look-up for every row, on the host."""

    def __init__(self, num_rows: int, max_match: int, min_match: int) -> None:
        self._sizes = (max_match, min_match)
        self._indexes = [NgramIndex(*self._sizes) for _ in range(num_rows)]

    def start(self, row: int, text: Text) -> float:
        self.forget(row)
        self._indexes[row].look_up(text.host[row], 0)
        return 0.0

    def forget(self, row: int) -> None:
        """The row's text is another one from now on, of which nothing was read."""
        self._indexes[row] = NgramIndex(*self._sizes)

    def settle(self, text: Text) -> None:
        """Nothing to note: the index reads committed text only."""

    def propose(self, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        matches = [
            index.look_up(host, limit) if limit > 0 else []
            for index, host, limit in zip(self._indexes, text.host, limits, strict=True)
        ]
        width = max(map(len, matches))
        counted = to_device(
            [[len(tokens), *tokens, *[0] * (width - len(tokens))] for tokens in matches], positions.device
        )
        proposal = Proposal(
            token_ids=counted[:, 1:],
            counts=counted[:, 0],
            draft_probs=None,
            certain=torch.ones_like(positions, dtype=torch.bool),
        )
        return Drafted(proposal=proposal, matched=tuple(map(bool, matches)))


class CompositeDrafter:
    """A look-up where the text has a match, else the draft model: one source per row and round."""

    def __init__(self, ngram: NgramDrafter, model: ModelDrafter) -> None:
        self._ngram = ngram
        self._model = model

    def start(self, row: int, text: Text) -> float:
        return self._ngram.start(row, text) + self._model.start(row, text)

    def propose(self, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        looked_up = self._ngram.propose(text, limits, positions)
        model_limits = [0 if matched else limit for matched, limit in zip(looked_up.matched, limits, strict=True)]
        if not any(model_limits):
            return looked_up
        modelled = self._model.propose(text, model_limits, positions)
        return Drafted(
            proposal=_combine(looked_up.proposal, modelled.proposal),
            steps=modelled.steps,
            first_width=modelled.first_width,
        )

    def settle(self, text: Text) -> None:
        self._model.settle(text)


ComponentDrafter = ModelDrafter | NgramDrafter


def combined_drafter(components: Sequence[ComponentDrafter]) -> Drafter:
    """The drafter of a draft from those of its components (see `Draft.components`)."""
    match components:
        case [NgramDrafter() as ngram, ModelDrafter() as model]:
            return CompositeDrafter(ngram, model)
    return components[0]


def _combine(looked_up: Proposal, modelled: Proposal) -> Proposal:
    """The rows for which the look-up proposes anything, and the model's proposals for the others."""
    certain = looked_up.counts > 0
    width = max(looked_up.token_ids.shape[1], modelled.token_ids.shape[1])
    certain_tokens, model_tokens = (
        functional.pad(proposal.token_ids, (0, width - proposal.token_ids.shape[1]))
        for proposal in (looked_up, modelled)
    )
    draft_probs = modelled.draft_probs
    if draft_probs is not None:
        draft_probs = functional.pad(draft_probs, (0, 0, 0, width - draft_probs.shape[1]))
    return Proposal(
        token_ids=torch.where(certain[:, None], certain_tokens, model_tokens),
        counts=torch.where(certain, looked_up.counts, modelled.counts),
        draft_probs=draft_probs,
        certain=certain,
    )
