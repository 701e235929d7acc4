"""Plain and speculative decoding of a queue of prompts, several rows at once: one loop for both arms of a comparison.

A round drafts for every row, lets the target check all proposals in one forward and adds one target token to each row;
plain decoding is the same loop with nothing proposed. A finished row is refilled from the queue. Acceptance and the
next inputs are computed on the device; the host reads one small tensor a round. Knows nothing of stores or searches.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from profiles.engines.torch.batch_model import RowStepper
from profiles.engines.torch.drafters import Drafted, Drafter, Text, nothing
from profiles.engines.torch.sampling import KeyedRandom, accept_greedy, accept_sampled, draw, sampling_probs
from profiles.records.core import Prompt
from profiles.records.errors import BadNumbersError
from profiles.records.evidence import RoundCount, StepShape
from profiles.timing.clock import Clock

NOT_FINITE = "the target's logits are not finite; check its weights, or use a wider dtype"


@dataclass(slots=True, kw_only=True)
class Generation:
    """What was emitted for one prompt (the end token included) and what it took.

    `rounds` counts (proposed, accepted) of its row. `shapes` counts the forwards that the whole batch ran meanwhile:
    (width of the target's step, steps of the draft model, width of the first of them). `refills`: other rows' prefills
    that it waited for.
    """

    token_ids: list[int]
    rounds: Counter[RoundCount] = field(default_factory=Counter)
    shapes: Counter[StepShape] = field(default_factory=Counter)
    refills: int = 0
    ended: bool = False
    ttft_s: float = 0.0
    decode_s: float = 0.0
    target_probs: list[float] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """A prompt under way: when its first token was there, and what it has so far."""

    prompt: Prompt
    prompt_tokens: int
    first_s: float
    run: Generation

    def place(self, text: list[int]) -> int:
        """The next output position."""
        return len(text) - self.prompt_tokens


class Decoder:
    """Decodes queues of prompts on `target`'s rows; `length` proposals a row and round at most.

    `length` may be lowered, and raised again, between rounds. `watch` keeps the target's probability and logit gap of
    every emitted token; rows are then read one by one.
    """

    def __init__(
        self,
        target: RowStepper,
        drafter: Drafter | None,
        draws: KeyedRandom,
        *,
        length: int = 0,
        watch: bool = False,
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._workload = workload = draws.workload
        self._draws = draws
        self.length = length
        self._watch = watch
        self._ends = frozenset(workload.end_token_ids)
        capacity = workload.context_length + length + 2  # what is proposed past the last token is written too
        self.text = Text(target.num_rows, capacity, target.device)
        self._prompt_tokens = torch.ones_like(self.text.lengths)
        self._active = torch.zeros_like(self.text.lengths)
        self.rows: list[Row | None] = [None] * target.num_rows

    def run(
        self, prompts: Sequence[Prompt], clock: Clock, play: Callable[[], object] | None = None
    ) -> list[Generation]:
        """One generation per prompt, in the order given. Raises BadNumbersError when logits are not finite.

        `play` is called in place of every round: it does what is to be done before and after it, and plays it.
        """
        play = play or self.round
        runs = [Generation(token_ids=[]) for _ in prompts]
        waiting = deque(zip(prompts, runs, strict=True))
        with torch.inference_mode():
            for row in range(len(self.rows)):
                self._refill(row, waiting, clock)
            while any(row is not None for row in self.rows):
                play()
                for number in self._leave(clock):
                    self._refill(number, waiting, clock)
        return runs

    def _leave(self, clock: Clock) -> list[int]:
        """The rows that are done, now empty; all at the same time, whoever is refilled first."""
        done = [(number, row) for number, row in enumerate(self.rows) if row and self._is_done(number, row)]
        now = clock.read() if done else 0.0
        for number, row in done:
            row.run.decode_s = now - row.first_s
            row.run.token_ids = self.text.host[number][row.prompt_tokens :]
            self.rows[number] = None
            self._active[number] = 0
        return [number for number, _ in done]

    def _is_done(self, number: int, row: Row) -> bool:
        return row.run.ended or row.place(self.text.host[number]) >= self._workload.max_new_tokens

    def _refill(self, number: int, waiting: deque[tuple[Prompt, Generation]], clock: Clock) -> None:
        """Puts the next prompt into a row and emits its first token; an output that ends there makes room again."""
        while waiting and self.rows[number] is None:
            prompt, run = waiting.popleft()
            for other in self.rows:
                if other is not None:
                    other.run.refills += 1
            started = clock.read()
            self._draws.load(number, prompt)
            token = self._prefill(number, prompt, run)
            self.text.load(number, [*prompt.token_ids, token])
            if self._drafter is not None:
                self._drafter.start(number, self.text)
            first = clock.read()
            run.ttft_s, run.ended = first - started, token in self._ends
            row = Row(prompt=prompt, prompt_tokens=len(prompt.token_ids), first_s=first, run=run)
            if self._is_done(number, row):
                run.token_ids = [token]
                continue
            self.rows[number] = row
            self._prompt_tokens[number] = row.prompt_tokens
            self._active[number] = 1

    def _prefill(self, number: int, prompt: Prompt, run: Generation) -> int:
        tokens = torch.tensor([prompt.token_ids], device=self._target.device)
        positions = torch.arange(tokens.shape[1], device=self._target.device)[None]
        logits = self._target.step(tokens, positions, tokens.shape[1], row=number)[:, 0]
        if not bool(torch.isfinite(logits).all()):
            raise BadNumbersError(NOT_FINITE)
        law = sampling_probs(logits, self._workload) if self._watch or not self._draws.is_greedy else logits
        token = int(logits.argmax(-1)) if self._draws.is_greedy else int(draw(law, self._draws.first(number)))
        if self._watch:
            self._note(run, logits[0], float(law[0, token]))
        return token

    def round(self) -> list[RoundCount]:
        """One round of all rows under way; (proposed, accepted) of each of them."""
        text = self.text
        asked = [
            0 if row is None else min(self.length, self._workload.max_new_tokens - row.place(host) - 1)
            for row, host in zip(self.rows, text.host, strict=True)
        ]
        places = text.lengths - self._prompt_tokens
        drafted = Drafted(proposal=nothing(len(asked), text.lengths.device))
        if self._drafter is not None and max(asked) > 0:
            drafted = self._drafter.propose(text, asked, places)
        proposal = drafted.proposal
        widest = proposal.token_ids.shape[1]
        last, positions = text.last(1)
        ahead = torch.arange(widest + 1, device=positions.device)
        logits = self._target.step(
            torch.cat([last, proposal.token_ids], 1), positions + ahead, text.reach + widest, keep=widest + 1
        )
        law = None
        if self._draws.is_greedy:
            accepted, token = accept_greedy(proposal, logits)
        else:
            law = sampling_probs(logits, self._workload)
            accepted, token = accept_sampled(proposal, law, self._draws, places)
        block = functional.pad(proposal.token_ids, (0, 1)).scatter(1, accepted[:, None], token[:, None])
        text.token_ids.scatter_(1, text.lengths[:, None] + ahead, block)
        text.lengths += (accepted + 1) * self._active
        read = torch.cat([proposal.counts[:, None], accepted[:, None], block], 1).tolist()  # the round's one transfer
        outcomes = []
        for number, (proposed, kept, *tokens) in enumerate(read):
            row = self.rows[number]
            if row is not None:
                row.run.shapes[StepShape(widest + 1, drafted.steps, drafted.first_width)] += 1
                outcomes.append(RoundCount(proposed, self._commit(number, row, proposed, tokens[: kept + 1])))
                if self._watch:
                    probs = sampling_probs(logits[number], self._workload) if law is None else law[number]
                    self._note(row.run, logits[number, kept], float(probs[kept, tokens[kept]]))
        if self._drafter is not None:
            self._drafter.settle(text)
        return outcomes

    def _commit(self, number: int, row: Row, proposed: int, tokens: list[int]) -> int:
        """How many were accepted.

        Tokens proposed after an accepted end token count as drafted, not accepted; no target token follows it.
        """
        accepted = len(tokens) - 1
        end = next((index for index, token in enumerate(tokens) if token in self._ends), None)
        if end is not None:
            tokens, row.run.ended = tokens[: end + 1], True
            accepted = min(accepted, end + 1)
        row.run.rounds[RoundCount(proposed, accepted)] += 1
        self.text.host[number] += tokens
        return accepted

    def _note(self, run: Generation, logits: torch.Tensor, prob: float) -> None:
        first, second = logits.float().topk(2).values.tolist()
        if not math.isfinite(first - second):
            raise BadNumbersError(NOT_FINITE)
        run.target_probs.append(prob)
        run.logit_gaps.append(first - second)
