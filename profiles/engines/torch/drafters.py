"""What proposes tokens for every row of a batch: a draft model, a look-up of n-grams in the text, or both.

A drafter reads the committed text of the rows and finds out itself how far it is behind; it never sees the target.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP, catch_up_width
from profiles.acceptance.ngram import NgramIndex
from profiles.engines.torch.batch_model import RowStepper
from profiles.engines.torch.sampling import KeyedRandom, Proposal, draw, sampling_probs
from profiles.records.core import Draft


class Text:
    """The committed tokens of every row, on the device for forwards and on the host for look-ups.

    `token_ids` (rows, capacity) and `lengths` (rows,) are the device's; `host[row]` is the same text as a list.
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
        self.token_ids[row, : len(token_ids)] = torch.tensor(token_ids)
        self.lengths[row] = len(token_ids)

    def last(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `width` tokens of every row and their positions, (rows, width); positions below 0 are padding."""
        positions = self.lengths[:, None] + torch.arange(-width, 0, device=self.lengths.device)
        return self.token_ids.gather(1, positions.clamp_min(0)), positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A proposal and what the draft model ran for it: steps, and the width of the first one; 0 and 0 without it.

    `found` says which rows a look-up found something for.
    """

    proposal: Proposal
    found: tuple[bool, ...] = ()
    steps: int = 0
    first_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """A draft that is ready to use: its record and, where it has one, its model."""

    draft: Draft
    model: PreTrainedModel | None


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch."""

    def start(self, row: int, text: Text) -> None:
        """Takes in a row's text, a prompt and its first token; part of the time to first token."""
        ...

    def propose(self, text: Text, asked: list[int], places: torch.Tensor) -> Drafted:
        """At most `asked[row]` tokens to follow each row; `places` (rows,) are the next output positions."""
        ...

    def settle(self, text: Text) -> None:
        """Notes what was kept of the last proposals; once after every round, because other drafts' may follow."""
        ...


@functools.cache
def nothing(num_rows: int, device: torch.device) -> Proposal:
    """No row proposes; made once, because every plain round asks for it."""
    counts = torch.zeros(num_rows, dtype=torch.long, device=device)
    return Proposal(token_ids=counts[:, None][:, :0], counts=counts, probs=None, certain=counts == 0)


class ModelDrafter:
    """A causal language model drafting token by token, greedily or from its law under the workload's sampling.

    The first step of a round takes in the last tokens of every row, as many as the furthest row is behind, in one of
    a few widths; what a row had already taken in is written again with the same values. `stop_below`: see `Setup`; it
    may change between rounds.
    """

    def __init__(self, model: RowStepper, draws: KeyedRandom) -> None:
        self.stop_below: float | None = None
        self._model = model
        self._draws = draws
        self._taken_in = [0] * model.num_rows
        self._judged = [0] * model.num_rows  # text length up to which its choices were held against the text
        self._drafted = [(0, 0)] * model.num_rows  # text length at the last proposal, drafted tokens taken in then

    def start(self, row: int, text: Text) -> None:
        prompt = text.host[row][:-1]
        positions = torch.arange(len(prompt), device=self._model.device)[None]
        self._model.step(text.token_ids[row : row + 1, : len(prompt)], positions, len(prompt), row=row)
        self.forget(row)
        self._taken_in[row] = len(prompt)

    def forget(self, row: int) -> None:
        """The row's text is another one from now on, of which nothing was taken in."""
        self._taken_in[row], self._judged[row], self._drafted[row] = 0, 0, (0, 0)

    def settle(self, text: Text) -> None:
        for row, (length, taken_in) in enumerate(self._drafted):
            if length > 0:
                size = len(text.host[row])
                self._taken_in[row] += min(taken_in, size - length - 1)  # the kept ones of those taken in are right
                self._judged[row], self._drafted[row] = size, (0, 0)

    def propose(self, text: Text, asked: list[int], places: torch.Tensor) -> Drafted:
        tokens, positions, width = self._catch_up(text, asked)
        chosen: list[torch.Tensor] = []
        laws: list[torch.Tensor] = []
        counts, wanted = torch.zeros_like(places), torch.tensor(asked, device=places.device)
        alive, forwards = wanted > 0, 0
        for number in range(max(asked)):
            logits = self._model.step(tokens, positions, text.reach + number)[:, 0]
            alive, forwards = alive & (number < wanted), forwards + 1
            if self.stop_below is not None:
                # a round stops before a proposal is drawn, never after: dropping a drawn token would bend the law
                alive = alive & (torch.softmax(logits.float(), -1).amax(-1) >= self.stop_below)
                if not bool(alive.any()):
                    break
            if self._draws.is_greedy:
                token = logits.argmax(-1)
            else:
                laws.append(sampling_probs(logits, self._draws.workload))
                token = draw(laws[-1], self._draws.at("draft", (places + number)[:, None])[:, 0])
            counts = counts + alive.long()
            chosen.append(token)
            tokens, positions = token[:, None], (text.lengths + number)[:, None]
        self._note(text, asked, (len(chosen), width))
        if not chosen:
            return Drafted(proposal=nothing(len(asked), places.device), steps=forwards, first_width=width)
        proposal = Proposal(
            token_ids=torch.stack(chosen, 1),
            counts=counts,
            probs=torch.stack(laws, 1) if laws else None,
            certain=torch.zeros_like(alive),
        )
        return Drafted(proposal=proposal, steps=forwards, first_width=width)

    def _catch_up(self, text: Text, asked: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(tokens, positions, whole width) of the first step; what does not fit into one step is taken in before."""
        behind = [len(host) - self._taken_in[row] for row, host in enumerate(text.host)]
        width = catch_up_width(max(most for row, most in enumerate(behind) if asked[row] > 0))
        *before, (tokens, positions, _) = _chunks(text, width)
        for chunk in before:
            self._model.step(*chunk)
        return tokens, positions, width

    def score(self, text: Text, firsts: Mapping[int, int]) -> dict[int, list[bool]]:
        """Takes in the text that rows have beyond its own rounds: which tokens would have been its first choice.

        `firsts`: of every row that counts the place of the first token that does. Rows without a new one are left
        out, and without any nothing is done.
        """
        starts = {row: max(first, self._judged[row]) for row, first in firsts.items()}
        starts = {row: start for row, start in starts.items() if start < len(text.host[row])}
        if not starts:
            return {}
        behind = {row: len(text.host[row]) - min(self._taken_in[row], start - 1) for row, start in starts.items()}
        width = catch_up_width(max(behind.values()))
        wanted = 1 + max(len(text.host[row]) - start for row, start in starts.items())  # last places with a choice
        choices: list[torch.Tensor] = []
        left = width
        for tokens, positions, reach in _chunks(text, width):
            left -= tokens.shape[1]
            keep = tokens.shape[1] if left < wanted else 1
            logits = self._model.step(tokens, positions, reach, keep)
            if left < wanted:
                choices.append(logits.argmax(-1))
        made = torch.cat(choices, 1)
        agrees = (made[:, :-1] == text.last(made.shape[1] - 1)[0]).tolist()
        self._take_in(text, width)
        for row in starts:
            self._judged[row] = len(text.host[row])
        return {row: agrees[row][start - len(text.host[row]) :] for row, start in starts.items()}

    def _take_in(self, text: Text, width: int) -> None:
        """A step over the last `width` tokens of every row has run; rows further behind got nothing from it."""
        for row, host in enumerate(text.host):
            if len(host) - self._taken_in[row] <= width:
                self._taken_in[row] = len(host)

    def _note(self, text: Text, asked: list[int], ran: tuple[int, int]) -> None:
        steps, width = ran
        self._take_in(text, width)
        for row, host in enumerate(text.host):
            if asked[row] > 0:  # the width was made for these: none of them is behind
                self._drafted[row] = (len(host), max(0, steps - 1))


def _chunks(text: Text, width: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """The last `width` tokens of every row as (tokens, positions, reach) of steps of 64 at most."""
    tokens, positions = text.last(width)
    return [
        (
            tokens[:, first : first + WIDEST_CATCH_UP],
            positions[:, first : first + WIDEST_CATCH_UP],
            text.reach - max(0, width - first - WIDEST_CATCH_UP),
        )
        for first in range(0, width, WIDEST_CATCH_UP)
    ]


class NgramDrafter:
    """Prompt look-up for every row, on the host."""

    def __init__(self, num_rows: int, max_match: int, min_match: int) -> None:
        self._sizes = (max_match, min_match)
        self._indexes = [NgramIndex(*self._sizes) for _ in range(num_rows)]

    def start(self, row: int, text: Text) -> None:
        self.forget(row)
        self._indexes[row].look_up(text.host[row], 0)

    def forget(self, row: int) -> None:
        """The row's text is another one from now on, of which nothing was read."""
        self._indexes[row] = NgramIndex(*self._sizes)

    def settle(self, text: Text) -> None:
        """Nothing is to be noted: the index reads committed text only."""

    def propose(self, text: Text, asked: list[int], places: torch.Tensor) -> Drafted:
        found = [
            index.look_up(host, most) if most > 0 else []
            for index, host, most in zip(self._indexes, text.host, asked, strict=True)
        ]
        widest = max(map(len, found))
        padded = torch.tensor([[*tokens, *[0] * (widest - len(tokens))] for tokens in found], dtype=torch.long)
        counts = torch.tensor([len(tokens) for tokens in found])
        proposal = Proposal(
            token_ids=padded.to(places.device),
            counts=counts.to(places.device),
            probs=None,
            certain=torch.ones_like(places, dtype=torch.bool),
        )
        return Drafted(proposal=proposal, found=tuple(map(bool, found)))


class CompositeDrafter:
    """A look-up where the text has a match, else the draft model: one source per row and round."""

    def __init__(self, ngram: NgramDrafter, model: ModelDrafter) -> None:
        self._ngram = ngram
        self._model = model

    def start(self, row: int, text: Text) -> None:
        self._ngram.start(row, text)
        self._model.start(row, text)

    def propose(self, text: Text, asked: list[int], places: torch.Tensor) -> Drafted:
        matched = self._ngram.propose(text, asked, places)
        unmatched = [0 if found else most for found, most in zip(matched.found, asked, strict=True)]
        if not any(unmatched):
            return matched
        drafted = self._model.propose(text, unmatched, places)
        return Drafted(
            proposal=_either(matched.proposal, drafted.proposal),
            steps=drafted.steps,
            first_width=drafted.first_width,
        )

    def settle(self, text: Text) -> None:
        self._model.settle(text)


PartDrafter = ModelDrafter | NgramDrafter


def assembled(parts: Sequence[PartDrafter]) -> Drafter:
    """The drafter of a draft from those of its parts (see `Draft.parts`)."""
    match parts:
        case [NgramDrafter() as ngram, ModelDrafter() as model]:
            return CompositeDrafter(ngram, model)
    return parts[0]


def _either(certain: Proposal, drafted: Proposal) -> Proposal:
    """The rows of `certain` that propose anything, and of `drafted` the others."""
    is_certain = certain.counts > 0
    widest = max(certain.token_ids.shape[1], drafted.token_ids.shape[1])
    ours, theirs = (functional.pad(one.token_ids, (0, widest - one.token_ids.shape[1])) for one in (certain, drafted))
    probs = drafted.probs
    if probs is not None:
        probs = functional.pad(probs, (0, 0, 0, widest - probs.shape[1]))
    return Proposal(
        token_ids=torch.where(is_certain[:, None], ours, theirs),
        counts=torch.where(is_certain, certain.counts, drafted.counts),
        probs=probs,
        certain=is_certain,
    )
