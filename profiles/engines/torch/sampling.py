"""The target's law after temperature, top-k and top-p, keyed random numbers, and the acceptance rule, for many rows.

Both arms of every comparison draw through here, so a setup never changes how randomness is used. Everything stays on
the device: nothing here waits for it. Knows no models.
"""

import hashlib
from dataclasses import dataclass

import torch

from profiles.records.core import Prompt, Workload

PURPOSES = ("target", "accept", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Drafted tokens of every row, (rows, most proposed); a row's own are the first `counts` (rows,) of them.

    `probs` (rows, most proposed, vocabulary) are the laws they were drawn from; None: every draft was certain, as are
    the rows in `certain` (rows,) of a proposal with laws.
    """

    token_ids: torch.Tensor
    counts: torch.Tensor
    probs: torch.Tensor | None
    certain: torch.Tensor


class KeyedRandom:
    """A workload's randomness: uniform numbers in [0, 1) by row, purpose and output position.

    They are equal for every setup of the same prompt. Greedy decoding draws nothing.
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
        """(1,): what draws the row's first token."""
        return self._uniforms["target"][row, :1]

    def at(self, purpose: str, places: torch.Tensor) -> torch.Tensor:
        """The numbers at output positions `places` (rows, any); past the end, where nothing is kept, the last one."""
        uniforms = self._uniforms[purpose]
        return uniforms.gather(1, places.clamp(0, uniforms.shape[1] - 1))


def keyed_uniforms(workload: Workload, prompt: Prompt, purpose: str) -> torch.Tensor:
    """Numbers for every output position, keyed by (seed, prompt, purpose)."""
    key = hashlib.sha256(f"{workload.seed}/{prompt.digest}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.rand(workload.max_new_tokens, generator=generator, dtype=torch.float64)


def sampling_probs(logits: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Probabilities (any, vocabulary), float32, from logits of that shape: temperature, then top-k, then top-p.

    The smallest set of most likely tokens whose mass reaches top-p is kept, at least one; the rest is zero and the
    kept mass is scaled to 1. At temperature 0: the unfiltered softmax, for the record only.
    """
    logits = logits.float()
    if workload.temperature == 0.0:
        return torch.softmax(logits, -1)
    logits = logits / workload.temperature
    if 0 < workload.top_k < logits.shape[-1]:
        threshold = logits.topk(workload.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probs = torch.softmax(logits, -1)
    if workload.top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= workload.top_p
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row at `uniforms` (rows,) of its cumulated probabilities (rows, vocabulary).

    Never one of probability zero: rounding at the very end gives the last possible token.
    """
    cumulated = probs.double().cumsum(-1)
    places = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)
    last = probs.shape[-1] - 1 - (probs > 0.0).long().flip(-1).argmax(-1, keepdim=True)
    return torch.minimum(places, last)[:, 0]


def accept_greedy(proposal: Proposal, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(accepted, target token), each (rows,): proposals are kept while they equal the target's own choice there."""
    choices = logits.argmax(-1)
    accepted = _kept(proposal.token_ids == choices[:, :-1], proposal)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    proposal: Proposal, target_probs: torch.Tensor, draws: KeyedRandom, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(accepted, target token), each (rows,), by rejection sampling (Leviathan et al. 2023, algorithm 1).

    `target_probs` (rows, proposals + 1, vocabulary); `places` (rows,) are the output positions of the first proposals.
    A row whose draft is certain (n-gram) offers its proposals with probability 1.
    """
    asked = proposal.token_ids.shape[1]
    accepted = torch.zeros_like(places)
    if asked > 0:
        steps = places[:, None] + torch.arange(asked, device=places.device)
        wanted = target_probs[:, :-1].gather(2, proposal.token_ids[:, :, None])[:, :, 0].double()
        offered = torch.ones_like(wanted)
        if proposal.probs is not None:
            own = proposal.probs.gather(2, proposal.token_ids[:, :, None])[:, :, 0].double()
            offered = torch.where(proposal.certain[:, None], offered, own)
        accepted = _kept(draws.at("accept", steps) * offered < wanted, proposal)
    law = target_probs[torch.arange(len(accepted), device=accepted.device), accepted]
    if asked > 0:
        law = torch.where(
            (accepted < proposal.counts)[:, None], _rest(proposal, law, accepted.clamp(max=asked - 1)), law
        )
    return accepted, draw(law, draws.at("target", (places + accepted)[:, None])[:, 0])


def _kept(agrees: torch.Tensor, proposal: Proposal) -> torch.Tensor:
    """How many leading proposals of each row are kept, given which agree (rows, proposals)."""
    proposed = torch.arange(agrees.shape[1], device=agrees.device) < proposal.counts[:, None]
    return (agrees & proposed).long().cumprod(1).sum(1)


def _rest(proposal: Proposal, law: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What the target's law (rows, vocabulary) holds beyond the draft's at the refused proposals `places` (rows,)."""
    refused = proposal.token_ids.gather(1, places[:, None])
    offered = torch.zeros_like(law).scatter_(1, refused, law.gather(1, refused))  # certain: all of that token is gone
    if proposal.probs is not None:
        own = proposal.probs[torch.arange(len(places), device=places.device), places]
        offered = torch.where(proposal.certain[:, None], offered, own)
    rest = (law - offered).clamp_min(0.0)
    # where the laws are equal up to rounding any token of the target's law is right
    return torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, law)
