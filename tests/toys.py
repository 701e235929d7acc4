"""A toy model whose law is a table: the next token depends on the last one only, so exact laws can be written down."""

from types import SimpleNamespace
from typing import Any

import torch

from profiles.clock import Clock
from profiles.decoding import Generation, TargetStepper, generate
from profiles.drafting import ModelDrafter, NgramDrafter
from profiles.sampling import keyed_draws, output_law
from profiles.terms import Prompt, Workload

VOCABULARY = 5


class TableModel:
    """Logits (vocabulary, vocabulary) by last token, behind the call of a transformers model; it needs no cache."""

    def __init__(self, seed: int, scale: float = 1.5, vocabulary: int = VOCABULARY) -> None:
        self.device = torch.device("cpu")
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale

    def __call__(self, tokens: torch.Tensor, *, logits_to_keep: int = 0, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[tokens[:, -logits_to_keep:]])


def near(model: TableModel, seed: int, distance: float) -> TableModel:
    """A draft for `model`: the same table, disturbed."""
    draft = TableModel(seed, distance, len(model.table))
    draft.table += model.table
    return draft


def run(target: Any, draft: Any, length: int, workload: Workload, prompt: Prompt) -> Generation:
    """Decodes `prompt` with a model draft, `ngram`, or plain (None)."""
    draws = keyed_draws(workload, prompt)
    drafter = None
    if draft == "ngram":
        drafter = NgramDrafter(2, 1)
    elif draft is not None:
        drafter = ModelDrafter(draft, workload, draws)
    stepper = TargetStepper(target, workload, prompt, draws, watch=draft is None)
    return generate(stepper, drafter, length, Clock("cpu"))


def sequence_law(model: TableModel, workload: Workload, first: int) -> dict[tuple[int, ...], float]:
    """Exact probability of every output of `max_new_tokens` tokens after a prompt that ends in `first`."""
    step = output_law(model.table, workload).double()
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(workload.max_new_tokens):
        laws = {
            (*output, token): mass * float(step[output[-1] if output else first, token])
            for output, mass in laws.items()
            for token in range(len(step))
        }
    return {output: mass for output, mass in laws.items() if mass > 0.0}
