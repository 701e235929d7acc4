"""Plain and speculative decoding of a queue of prompts, several rows at once: one loop for both arms of a comparison.

Plain decoding is the same loop with nothing proposed. A finished row is refilled from the queue. Acceptance and the
next inputs are computed on the device; the host reads one small tensor a round. Shapes: B rows, k proposed tokens of
the row that proposes most, V tokens of the vocabulary.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from profiles.engines.runs import Run
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.drafters import Drafted, Drafter, Text, no_proposal
from profiles.engines.torch.sampling import KeyedRandom, accept_greedy, accept_sampled, draw, sampling_probs
from profiles.records.core import Prompt
from profiles.records.errors import BadNumbersError
from profiles.records.evidence import RoundCount, StepShape, TargetTrace
from profiles.timing.clock import Clock

NOT_FINITE = "the target's logits are not finite; check its weights, or use a wider dtype"


@dataclass(slots=True, kw_only=True)
class Generation(Run):
    """What was emitted for one prompt, the end token included, and what it took."""

    token_ids: list[int] = field(default_factory=list)
    ttft_s: float = 0.0
    decode_s: float = 0.0
    rounds: Counter[RoundCount] = field(default_factory=Counter)
    shapes: Counter[StepShape] = field(default_factory=Counter)
    ended: bool = False
    target_probs: list[float] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)

    def target_trace(self, prompt: Prompt) -> TargetTrace:
        """What a plain run that was watched tells of the target."""
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(self.token_ids),
            target_probs=tuple(self.target_probs),
            logit_gaps=tuple(self.logit_gaps),
            ended=self.ended,
        )


@dataclass(slots=True, kw_only=True)
class Row:
    """A prompt under way: when its first token was there, and what it has so far."""

    prompt: Prompt
    first_s: float
    run: Generation


class Decoder:
    """Decodes queues of prompts on the rows of `target`.

    Args:
        target: The model that verifies.
        drafter: What proposes; None for plain decoding.
        rng: The random numbers, and with them the workload.
        length: Proposed tokens a row and round at most; may be lowered and raised again between rounds. `row_lengths`
            may lower it by row number; rows that it does not name have `length`.
        watch: Keep the target's probability and logit gap of every emitted token; rows are then read separately.
    """

    def __init__(
        self, target: RowModel, drafter: Drafter | None, rng: KeyedRandom, *, length: int = 0, watch: bool = False
    ) -> None:
        self._target = target
        self._drafter = drafter
        self.workload = rng.workload
        self._rng = rng
        self.length = length
        self.row_lengths: dict[int, int] = {}
        self._watch = watch
        self._end_tokens = frozenset(rng.workload.end_token_ids)
        capacity = rng.workload.context_length + length + 2  # what is proposed past the last token is written too
        self.text = Text(target.num_rows, capacity, target.device)
        self._prompt_lengths = torch.ones_like(self.text.lengths)
        self._active = torch.zeros_like(self.text.lengths)
        self.rows: list[Row | None] = [None] * target.num_rows

    def run(
        self, prompts: Sequence[Prompt], clock: Clock, run_round: Callable[[], object] | None = None
    ) -> list[Generation]:
        """Decodes a queue: one generation per prompt, in the order given.

        `run_round` is called in place of `round`, and calls it. Raises BadNumbersError when logits are not finite.
        """
        run_round = run_round or self.round
        runs = [Generation() for _ in prompts]
        waiting = deque(zip(prompts, runs, strict=True))
        with torch.inference_mode():
            free, free_since_s = list(range(len(self.rows))), clock.read()
            while True:
                for number in free:
                    self._refill(number, waiting, clock, free_since_s)
                if all(row is None for row in self.rows):
                    break
                run_round()
                free, free_since_s = self._remove_finished(clock)
        return runs

    def round(self) -> list[RoundCount]:
        """One round of all rows under way; what each of them proposed and accepted."""
        text = self.text
        positions = text.lengths - self._prompt_lengths  # (B,), the output position of the first proposed token

        # draft: never more than the output still needs beside the bonus token
        limits = [
            0 if row is None else min(self.row_lengths.get(number, self.length), self._remaining(number) - 1)
            for number, row in enumerate(self.rows)
        ]
        drafted = Drafted(proposal=no_proposal(len(limits), text.lengths.device))
        if self._drafter is not None and max(limits) > 0:
            drafted = self._drafter.propose(text, limits, positions)
        proposal = drafted.proposal
        width = proposal.token_ids.shape[1] + 1

        # verify: one step of the target over the last committed token and the proposed ones
        last_tokens, last_positions = text.last(1)
        offsets = torch.arange(width, device=positions.device)
        inputs = torch.cat([last_tokens, proposal.token_ids], 1)  # (B, k+1)
        logits = self._target.step(inputs, last_positions + offsets, text.reach + width - 1, keep=width)  # (B, k+1, V)

        # accept: a prefix of the proposal, then one token of the target's own
        if self._rng.is_greedy:
            target_probs = None
            num_accepted, next_token = accept_greedy(proposal, logits)
        else:
            target_probs = sampling_probs(logits, self.workload)
            num_accepted, next_token = accept_sampled(proposal, target_probs, self._rng, positions)

        # commit: on the device, then on the host with the round's one transfer
        emitted = functional.pad(proposal.token_ids, (0, 1)).scatter(1, num_accepted[:, None], next_token[:, None])
        text.token_ids.scatter_(1, text.lengths[:, None] + offsets, emitted)
        text.lengths += (num_accepted + 1) * self._active
        transfer = torch.cat([proposal.counts[:, None], num_accepted[:, None], emitted], 1).tolist()
        shape = StepShape(width, drafted.steps, drafted.first_width)
        outcomes = []
        for number, (num_proposed, accepted, *tokens) in enumerate(transfer):
            row = self.rows[number]
            if row is None:
                continue
            row.run.shapes[shape] += 1
            outcomes.append(self._commit(number, row, num_proposed, tokens[: accepted + 1]))
            if self._watch:
                probs = sampling_probs(logits[number], self.workload) if target_probs is None else target_probs[number]
                self._note(row.run, logits[number, accepted], float(probs[accepted, tokens[accepted]]))
        if self._drafter is not None:
            self._drafter.settle(text)
        return outcomes

    def _commit(self, number: int, row: Row, proposed: int, tokens: list[int]) -> RoundCount:
        """Adds a row's new tokens to its text.

        Tokens proposed after an accepted end token count as proposed, not as accepted, and no bonus token follows it.
        """
        accepted = len(tokens) - 1
        end = next((index for index, token in enumerate(tokens) if token in self._end_tokens), None)
        if end is not None:
            tokens, row.run.ended = tokens[: end + 1], True
            accepted = min(accepted, end + 1)
        self.text.host[number] += tokens
        outcome = RoundCount(proposed, accepted)
        row.run.rounds[outcome] += 1
        return outcome

    def _remaining(self, number: int) -> int:
        """Tokens that a row under way may still emit."""
        row = self.rows[number]
        assert row is not None
        return self.workload.max_new_tokens - (len(self.text.host[number]) - len(row.prompt.token_ids))

    def _remove_finished(self, clock: Clock) -> tuple[list[int], float]:
        """The numbers of the rows that are done, now empty, and when; all at one time, whoever is refilled first."""
        done = [
            (number, row)
            for number, row in enumerate(self.rows)
            if row is not None and (row.run.ended or self._remaining(number) <= 0)
        ]
        now = clock.read() if done else 0.0
        for number, row in done:
            row.run.decode_s = now - row.first_s
            row.run.token_ids = self.text.host[number][len(row.prompt.token_ids) :]
            self.rows[number] = None
            self._active[number].fill_(0)
            self.text.clear(number)
        return [number for number, _ in done], now

    def _refill(
        self, number: int, waiting: deque[tuple[Prompt, Generation]], clock: Clock, free_since_s: float
    ) -> None:
        """Puts the next prompt into a row and emits its first token; an output that ends there frees the row again.

        A request's time begins when its row is free, as that of a client who always has as many requests under way: it
        includes the prefills of rows that are filled before.
        """
        while waiting and self.rows[number] is None:
            prompt, run = waiting.popleft()
            for other in self.rows:
                if other is not None:
                    other.run.refills += 1
            self._rng.load(number, prompt)
            token, spared_s = self._prefill(number, prompt, run)
            self.text.load(number, [*prompt.token_ids, token])
            if self._drafter is not None:
                spared_s += self._drafter.start(number, self.text)
            first_s = clock.read()
            run.ttft_s, run.ended = first_s - free_since_s + spared_s, token in self._end_tokens
            if run.ended:
                run.token_ids, free_since_s = [token], first_s
                continue
            self.rows[number] = Row(prompt=prompt, first_s=first_s, run=run)
            self._prompt_lengths[number].fill_(len(prompt.token_ids))
            self._active[number].fill_(1)

    def _prefill(self, number: int, prompt: Prompt, run: Generation) -> tuple[int, float]:
        """The first token, and the seconds that were spared (see `RowModel.prefill`)."""
        tokens = torch.tensor([prompt.token_ids], device=self._target.device)
        logits, spared_s = self._target.prefill(tokens, number)  # (1, V)
        if not bool(torch.isfinite(logits).all()):
            raise BadNumbersError(NOT_FINITE)
        probs = sampling_probs(logits, self.workload) if self._watch or not self._rng.is_greedy else logits
        token = int(logits.argmax(-1)) if self._rng.is_greedy else int(draw(probs, self._rng.first(number)))
        if self._watch:
            self._note(run, logits[0], float(probs[0, token]))
        return token, spared_s

    def _note(self, run: Generation, logits: torch.Tensor, prob: float) -> None:
        first, second = logits.float().topk(2).values.tolist()
        if not math.isfinite(first - second):
            raise BadNumbersError(NOT_FINITE)
        run.target_probs.append(prob)
        run.logit_gaps.append(first - second)
