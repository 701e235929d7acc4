"""A toy model whose law is a table: the next token depends on the last one only, so exact laws can be written down."""

from types import SimpleNamespace
from typing import Any

import torch

from profiles.clock import Clock
from profiles.decoding import Decoder, Generation
from profiles.drafting import Drafter, ModelDrafter, NgramDrafter
from profiles.sampling import Draws, output_law
from profiles.terms import Prompt, Workload

VOCABULARY = 5


class TableModel:
    """Logits (vocabulary, vocabulary) by last token, behind the call of a transformers model; it needs no cache."""

    def __init__(self, seed: int, scale: float = 1.5, vocabulary: int = VOCABULARY) -> None:
        self.device = torch.device("cpu")
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale

    def __call__(self, tokens: torch.Tensor, *, logits_to_keep: int = 0, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[tokens[:, -logits_to_keep:]])

    def rows(self, num_rows: int) -> "TableRows":
        return TableRows(self, num_rows)


class TableRows:
    """A table as rounds step it (`profiles.rows.RowStepper`)."""

    def __init__(self, model: TableModel, num_rows: int) -> None:
        self.num_rows = num_rows
        self.device = model.device
        self._table = model.table

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, reach: int, keep: int = 1, row: int | None = None
    ) -> torch.Tensor:
        assert tokens.shape == positions.shape == (self.num_rows if row is None else 1, tokens.shape[1])
        assert reach > int(positions.max())
        return self._table[tokens[:, -keep:]]


def near(model: TableModel, seed: int, distance: float) -> TableModel:
    """A draft for `model`: the same table, disturbed."""
    draft = TableModel(seed, distance, len(model.table))
    draft.table += model.table
    return draft


def run(target: Any, draft: Any, length: int, workload: Workload, prompt: Prompt) -> Generation:
    """Decodes `prompt` with a model draft, `ngram`, or plain (None), keeping probabilities of plain runs."""
    [generation] = run_queue(target, draft, length, workload, [prompt], watch=draft is None)
    return generation


def run_queue(
    target: Any, draft: Any, length: int, workload: Workload, prompts: list[Prompt], **watch: bool
) -> list[Generation]:
    """Decodes a queue of prompts, `batch_size` rows at a time."""
    draws = Draws(workload.batch_size, workload, torch.device("cpu"))
    drafter: Drafter | None = None
    if draft == "ngram":
        drafter = NgramDrafter(workload.batch_size, 2, 1)
    elif draft is not None:
        drafter = ModelDrafter(draft.rows(workload.batch_size), draws)
    decoder = Decoder(target.rows(workload.batch_size), drafter, draws, length=length, **watch)
    return decoder.run(prompts, Clock("cpu"))


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
