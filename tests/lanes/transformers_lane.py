"""Runs an emitted snippet with the installed transformers and counts what every round drafted and kept."""

from typing import Any
from unittest.mock import patch

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

PROMPT = torch.tensor([[5, 9, 7, 8, 5, 9, 7, 8, 5, 9, 7, 8, 5, 9]])
Rounds = list[tuple[int, int]]  # (drafted, accepted) of each


def run_snippet(text: str) -> dict[str, Any]:
    """The names a snippet defines."""
    names: dict[str, Any] = {}
    exec(compile(text, "snippet", "exec"), names)
    return names


def rounds_of(text: str, new_tokens: int) -> Rounds:
    """Generates with the snippet's models and kwargs, through the hook transformers calls after each round."""
    seen: Rounds = []

    def note(self: object, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        seen.append((scores.shape[1] - 1, int(num_matches)))

    names = run_snippet(text)
    hook, mask = "update_candidate_strategy", torch.ones_like(PROMPT)
    with patch.object(AssistedCandidateGenerator, hook, note), patch.object(PromptLookupCandidateGenerator, hook, note):
        names["model"].generate(PROMPT, attention_mask=mask, max_new_tokens=new_tokens, **names["generate_kwargs"])
    return seen


def drafts_as_asked(rounds: Rounds, length: int, new_tokens: int, *, looks_up: bool) -> bool:
    """Whether every round drafted `length` tokens, or all but one of those left.

    A look-up finds less or nothing in many a round: it drafted at most so many, and so many at least once.
    """
    if looks_up:
        return max(drafted for drafted, _ in rounds) == length
    generated = 0
    for drafted, accepted in rounds:
        if drafted != min(length, new_tokens - generated - 1):
            return False
        generated += accepted + 1
    return bool(rounds)
