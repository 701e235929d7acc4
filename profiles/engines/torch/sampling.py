"""Sampling distributions, keyed random numbers and the acceptance rule, for many rows at once.

Shapes: B rows, k proposed tokens of the row that proposes most, V tokens of the vocabulary. Everything stays on the
device; nothing here waits for it. Plain and speculative decoding draw through here, so that a setup never changes how
randomness is used.
"""

import hashlib
from dataclasses import dataclass

import torch

from profiles.records.core import Prompt, Workload

PURPOSES = ("target", "accept", "draft")
_LIKELIEST = 1024  # tokens in which top-p is looked for first


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Drafted tokens of every row: the first `counts[row]` of `token_ids[row]`.

    Args:
        token_ids: (B, k).
        counts: (B,).
        draft_probs: (B, k, V), the distributions the tokens were drawn from; None when no row's draft was sampled.
        certain: (B,) bool, rows whose tokens were not sampled: they count as proposed with probability 1.
    """

    token_ids: torch.Tensor
    counts: torch.Tensor
    draft_probs: torch.Tensor | None
    certain: torch.Tensor


class KeyedRandom:
    """Uniform numbers in [0, 1) by row, purpose and output position, the same for every setup of a prompt.

    Greedy decoding draws nothing.
    """

    def __init__(self, num_rows: int, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.is_greedy = workload.temperature == 0.0
        shape = (num_rows, workload.max_new_tokens)
        purposes = () if self.is_greedy else PURPOSES
        self._uniforms = {purpose: torch.zeros(shape, dtype=torch.float64, device=device) for purpose in purposes}

    def load(self, row: int, prompt: Prompt) -> None:
        """From now on `row` decodes `prompt`."""
        for purpose, uniforms in self._uniforms.items():
            uniforms[row] = keyed_uniforms(self.workload, prompt, purpose)

    def first(self, row: int) -> torch.Tensor:
        """(1,): the number that draws the row's first token."""
        return self._uniforms["target"][row, :1]

    def at(self, purpose: str, positions: torch.Tensor) -> torch.Tensor:
        """(B, n) numbers at output positions (B, n); past the end, where nothing is committed, the last one."""
        uniforms = self._uniforms[purpose]
        return uniforms.gather(1, positions.clamp(0, uniforms.shape[1] - 1))


def keyed_uniforms(workload: Workload, prompt: Prompt, purpose: str) -> torch.Tensor:
    """Numbers for every output position, keyed by (seed, prompt, purpose)."""
    key = hashlib.sha256(f"{workload.seed}/{prompt.digest}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.rand(workload.max_new_tokens, generator=generator, dtype=torch.float64)


def sampling_probs(logits: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Probabilities (..., V), float32, from logits of that shape: temperature, then top-k, then top-p.

    Top-p keeps the smallest set of most likely tokens whose mass reaches it, at least one; the kept mass is scaled to
    1. At temperature 0: the unfiltered softmax, for the record only.
    """
    logits = logits.float()
    if workload.temperature == 0.0:
        return torch.softmax(logits, -1)
    logits = logits / workload.temperature
    order = None
    if 0 < workload.top_k < logits.shape[-1]:
        highest, order = logits.topk(workload.top_k, -1)
        logits = logits.masked_fill(logits < highest[..., -1:], -torch.inf)
    probs = torch.softmax(logits, -1)
    return probs if workload.top_p == 1.0 else _nucleus(probs, workload.top_p, order)


def _nucleus(probs: torch.Tensor, top_p: float, order: torch.Tensor | None) -> torch.Tensor:
    """`probs` (..., V) without what lies outside of top-p; `order`: the indices of all that top-k left, likely first.

    Without top-k a processor looks whether the likeliest tokens hold the mass before it sorts the whole vocabulary; a
    GPU would have to wait for the answer.
    """
    if order is None and probs.device.type == "cpu" and probs.shape[-1] > _LIKELIEST:
        order = probs.topk(_LIKELIEST, -1).indices
        order = order if bool((probs.gather(-1, order).cumsum(-1)[..., -1] >= top_p).all()) else None
    if order is None:
        order = probs.sort(-1, descending=True).indices
    ordered = probs.gather(-1, order)
    cumulative = ordered.cumsum(-1)
    outside = (cumulative[..., -1:] >= top_p).expand(probs.shape).scatter(-1, order, cumulative - ordered >= top_p)
    probs = probs.masked_fill(outside, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(B,) tokens: of each row of `probs` (B, V) the one at `uniforms` (B,) of the cumulative distribution.

    Never one of probability zero: rounding at the very end gives the last possible token.
    """
    cumulative = probs.double().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    last_possible = probs.shape[-1] - 1 - (probs > 0.0).long().flip(-1).argmax(-1, keepdim=True)
    return torch.minimum(tokens, last_possible)[:, 0]


def accept_greedy(proposal: Proposal, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_accepted, next_token), each (B,): proposals are accepted while they are the target's own choice.

    `target_logits` (B, k+1, V). The next token is the recovered one, or the bonus token when all were accepted.
    """
    choices = target_logits.argmax(-1)  # (B, k+1)
    num_accepted = _leading(proposal.token_ids == choices[:, :-1], proposal)
    return num_accepted, choices.gather(1, num_accepted[:, None])[:, 0]


def accept_sampled(
    proposal: Proposal, target_probs: torch.Tensor, rng: KeyedRandom, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_accepted, next_token), each (B,), by rejection sampling (Leviathan et al. 2023, algorithm 1).

    `target_probs` (B, k+1, V); `positions` (B,) are the output positions of the first proposals. The next token is
    recovered from the residual distribution at the first rejection, or the bonus token when all were accepted.
    """
    rows = torch.arange(len(positions), device=positions.device)
    width = proposal.token_ids.shape[1]
    if width == 0:
        return torch.zeros_like(positions), draw(target_probs[:, 0], rng.at("target", positions[:, None])[:, 0])
    tokens = proposal.token_ids[:, :, None]
    target_prob = target_probs[:, :-1].gather(2, tokens)[:, :, 0].double()  # (B, k), of the proposed tokens
    draft_prob = torch.ones_like(target_prob)
    if proposal.draft_probs is not None:
        sampled_prob = proposal.draft_probs.gather(2, tokens)[:, :, 0].double()
        draft_prob = torch.where(proposal.certain[:, None], draft_prob, sampled_prob)
    steps = positions[:, None] + torch.arange(width, device=positions.device)
    # accept_prob = min(1, target_prob / draft_prob), without the division
    num_accepted = _leading(rng.at("accept", steps) * draft_prob < target_prob, proposal)
    next_probs = target_probs[rows, num_accepted]  # (B, V)
    residual = _residual_probs(proposal, next_probs, num_accepted.clamp(max=width - 1))
    next_probs = torch.where((num_accepted < proposal.counts)[:, None], residual, next_probs)
    return num_accepted, draw(next_probs, rng.at("target", (positions + num_accepted)[:, None])[:, 0])


def _leading(agrees: torch.Tensor, proposal: Proposal) -> torch.Tensor:
    """(B,): how many leading proposals of each row agree, of `agrees` (B, k)."""
    proposed = torch.arange(agrees.shape[1], device=agrees.device) < proposal.counts[:, None]
    return (agrees & proposed).long().cumprod(1).sum(1)


def _residual_probs(proposal: Proposal, target_probs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, V): max(0, target_probs - draft_probs) at the rejected proposals `index` (B,), not normalised.

    Where the two distributions are equal up to rounding, nothing is left and the target's own is returned.
    """
    rejected = proposal.token_ids.gather(1, index[:, None])
    # a certain draft has all its mass on its token
    draft_probs = torch.zeros_like(target_probs).scatter_(1, rejected, target_probs.gather(1, rejected))
    if proposal.draft_probs is not None:
        rows = torch.arange(len(index), device=index.device)
        draft_probs = torch.where(proposal.certain[:, None], draft_probs, proposal.draft_probs[rows, index])
    residual = (target_probs - draft_probs).clamp_min(0.0)
    return torch.where(residual.sum(-1, keepdim=True) > 0.0, residual, target_probs)
