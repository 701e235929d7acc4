"""Plain and speculative decoding of one sequence: one loop, so that both arms of a comparison share every line.

A round drafts, lets the target check the proposals in one forward and adds one target token. Plain decoding is the
same loop with nothing proposed. Knows nothing of stores, searches or why it is run.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from profiles.cache import CachedModel
from profiles.clock import Clock
from profiles.drafting import Drafter, Proposal
from profiles.errors import BadNumbersError
from profiles.sampling import Draws, accept_greedy, accept_sampled, output_law
from profiles.terms import Prompt, Workload

NOT_FINITE = "the target's logits are not finite; check its weights, or use a wider dtype"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one run emitted and what it took: tokens (the end token included), rounds, seconds, the allocator's peak."""

    token_ids: list[int]
    rounds: Counter[tuple[int, int]]
    ended: bool
    ttft_s: float
    decode_s: float
    target_probs: list[float] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None


class TargetStepper:
    """The target over one prompt: prefill, then check proposals; with `watch`, probabilities and gaps are kept."""

    def __init__(
        self, model: PreTrainedModel, workload: Workload, prompt: Prompt, draws: Draws | None, *, watch: bool = False
    ) -> None:
        self.workload = workload
        self.prompt = prompt
        self._cached = CachedModel(model)
        self._draws = draws
        self._watch = watch
        self.target_probs: list[float] = []
        self.logit_gaps: list[float] = []

    def prefill(self) -> int:
        """Ingests the prompt and emits token 0. Raises BadNumbersError when its logits are not finite."""
        logits = self._cached.step(list(self.prompt.token_ids), keep=1)
        if not bool(torch.isfinite(logits).all()):
            raise BadNumbersError(NOT_FINITE)
        return self.check([], Proposal(token_ids=[], probs=None), 0, logits)[1]

    def check(
        self, token_ids: list[int], proposal: Proposal, position: int, logits: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """(accepted, target token) for a proposal after the committed `token_ids`; one forward of 1 + proposed."""
        if logits is None:
            self._cached.rollback(len(token_ids) - 1)
            logits = self._cached.step([token_ids[-1], *proposal.token_ids], keep=1 + len(proposal.token_ids))
        if self._draws is None:
            result = accept_greedy(proposal.token_ids, logits.argmax(-1).tolist())
            probs = output_law(logits, self.workload) if self._watch else None
        else:
            probs = output_law(logits, self.workload)
            result = accept_sampled(proposal.token_ids, proposal.probs, probs, self._draws, position)
        if self._watch and probs is not None:
            self._note(logits[result[0]], float(probs[result[0], result[1]]))
        return result

    def _note(self, logits: torch.Tensor, prob: float) -> None:
        first, second = logits.float().topk(2).values.tolist()
        if not math.isfinite(first - second):
            raise BadNumbersError(NOT_FINITE)
        self.target_probs.append(prob)
        self.logit_gaps.append(first - second)


def generate(stepper: TargetStepper, drafter: Drafter | None, length: int, clock: Clock) -> Generation:
    """Decodes one prompt, `length` proposals a round at most; times are taken at the first and the last token.

    Tokens proposed after an accepted end token count as drafted, not accepted, and no target token follows it.
    """
    workload, prompt = stepper.workload, stepper.prompt
    ends = frozenset(workload.end_token_ids)
    nothing = Proposal(token_ids=[], probs=None)
    rounds: Counter[tuple[int, int]] = Counter()
    with torch.inference_mode():
        started = clock.read()
        token_ids = [*prompt.token_ids, stepper.prefill()]
        if drafter is not None:
            drafter.start(prompt.token_ids)
        first = clock.read()
        base, limit = len(prompt.token_ids), len(prompt.token_ids) + workload.max_new_tokens
        ended = token_ids[-1] in ends
        while not ended and len(token_ids) < limit:
            position = len(token_ids) - base
            asked = min(length, workload.max_new_tokens - position - 1)
            proposal = drafter.propose(token_ids, asked, position) if drafter is not None and asked > 0 else nothing
            accepted, token = stepper.check(token_ids, proposal, position)
            kept = [*proposal.token_ids[:accepted], token]
            end = next((index for index, kept_token in enumerate(kept) if kept_token in ends), None)
            if end is not None:
                kept, ended = kept[: end + 1], True
                accepted = min(accepted, end + 1)
            rounds[len(proposal.token_ids), accepted] += 1
            token_ids += kept
        last = clock.read()
    return Generation(
        token_ids=token_ids[base:],
        rounds=rounds,
        ended=ended,
        ttft_s=first - started,
        decode_s=last - first,
        target_probs=stepper.target_probs,
        logit_gaps=stepper.logit_gaps,
    )
