"""The target's law after temperature, top-k and top-p, keyed random numbers, and the acceptance rule.

Both arms of every comparison draw through here, so a setup never changes how randomness is used. Knows no models.
"""

import hashlib
from dataclasses import dataclass

import torch

from profiles.terms import Prompt, Workload

PURPOSES = ("target", "accept", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Uniform numbers in [0, 1), one per output position and purpose; equal for every setup of the same prompt."""

    target: list[float]
    accept: list[float]
    draft: list[float]


def keyed_draws(workload: Workload, prompt: Prompt) -> Draws | None:
    """Draws keyed by (seed, prompt, position, purpose); None when decoding is greedy and nothing is drawn."""
    if workload.temperature == 0.0:
        return None
    columns = {}
    for purpose in PURPOSES:
        key = hashlib.sha256(f"{workload.seed}/{prompt.digest}/{purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        columns[purpose] = torch.rand(workload.max_new_tokens, generator=generator, dtype=torch.float64).tolist()
    return Draws(**columns)


def output_law(logits: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Probabilities (rows, vocabulary), float32, from logits of that shape: temperature, then top-k, then top-p.

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


def draw(probs: torch.Tensor, uniform: float) -> int:
    """The token at `uniform` of the cumulated probabilities (vocabulary,); never one of probability zero."""
    cumulated = probs.double().cumsum(-1)
    total = float(cumulated[-1])
    index = int(
        torch.searchsorted(
            cumulated, torch.tensor(uniform * total, dtype=torch.float64, device=probs.device), right=True
        )
    )
    if index >= len(probs) or float(probs[index]) == 0.0:  # rounding at the very end
        return int(probs.nonzero()[-1])
    return index


def accept_greedy(proposals: list[int], choices: list[int]) -> tuple[int, int]:
    """(accepted, target token): proposals are kept while they equal the target's own choice at their place."""
    accepted = 0
    while accepted < len(proposals) and proposals[accepted] == choices[accepted]:
        accepted += 1
    return accepted, choices[accepted]


def accept_sampled(
    proposals: list[int], draft_probs: torch.Tensor | None, target_probs: torch.Tensor, draws: Draws, position: int
) -> tuple[int, int]:
    """(accepted, target token) by rejection sampling (Leviathan et al. 2023, algorithm 1).

    `draft_probs` (proposals, vocabulary) is the law each proposal was drawn from, None when the draft is certain of
    it (n-gram); `target_probs` (proposals + 1, vocabulary). `position` is the output position of the first proposal.
    """
    for index, token in enumerate(proposals):
        wanted = float(target_probs[index, token])
        offered = 1.0 if draft_probs is None else float(draft_probs[index, token])
        if draws.accept[position + index] * offered < wanted:
            continue
        rest = target_probs[index].clone()
        if draft_probs is None:
            rest[token] = 0.0
        else:
            rest = (rest - draft_probs[index]).clamp_min(0.0)
        if float(rest.sum()) <= 0.0:  # the laws are equal up to rounding: any token of the target's law is right
            rest = target_probs[index]
        return index, draw(rest, draws.target[position + index])
    return len(proposals), draw(target_probs[len(proposals)], draws.target[position + len(proposals)])
