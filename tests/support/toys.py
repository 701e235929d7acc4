"""A toy model whose law is a table: the next token depends on the last one only, so exact laws can be written down.

And a toy controller, which decides as scripted, whatever it observes.
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from scipy import stats

from profiles.engines.base import RequestInfo, RoundController, RoundDecision, RoundReport
from profiles.engines.torch.adaptive import AdaptiveLoop, AdaptiveRun, SwitchableDrafter
from profiles.engines.torch.decoder import Decoder, Generation
from profiles.engines.torch.drafters import Drafter, ModelDrafter, NgramDrafter
from profiles.engines.torch.sampling import KeyedRandom, sampling_probs
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.timing.clock import Clock

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
    """A table as rounds step it (`profiles.engines.torch.batch_model.RowModel`)."""

    def __init__(self, model: TableModel, num_rows: int) -> None:
        self.num_rows = num_rows
        self.device = model.device
        self._table = model.table

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, reach: int, keep: int = 1, row: int | None = None
    ) -> torch.Tensor:
        assert tokens.shape == positions.shape == (self.num_rows if row is None else 1, tokens.shape[1])
        assert reach > int(positions.max())
        last = len(self._table) - 1  # of a row that is done any token is stepped, a prompt's odd first one too
        return self._table[tokens[:, -keep:].clamp(max=last)]

    def prefill(self, tokens: torch.Tensor, row: int) -> tuple[torch.Tensor, float]:
        positions = torch.arange(tokens.shape[1])[None]
        return self.step(tokens, positions, tokens.shape[1], row=row)[:, 0], 0.0


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
    draws = KeyedRandom(workload.batch_size, workload, torch.device("cpu"))
    drafter: Drafter | None = None
    if draft == "ngram":
        drafter = NgramDrafter(workload.batch_size, 2, 1)
    elif draft is not None:
        drafter = ModelDrafter(draft.rows(workload.batch_size), draws)
    decoder = Decoder(target.rows(workload.batch_size), drafter, draws, length=length, **watch)
    return decoder.run(prompts, Clock("cpu"))


def sequence_law(model: TableModel, workload: Workload, first: int) -> dict[tuple[int, ...], float]:
    """Exact probability of every output of `max_new_tokens` tokens after a prompt that ends in `first`."""
    step = sampling_probs(model.table, workload).double()
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(workload.max_new_tokens):
        laws = {
            (*output, token): mass * float(step[output[-1] if output else first, token])
            for output, mass in laws.items()
            for token in range(len(step))
        }
    return {output: mass for output, mass in laws.items() if mass > 0.0}


def p_value(law: Mapping[tuple[int, ...], float], outputs: Sequence[tuple[int, ...]]) -> float:
    """Chi-square of outputs against their exact law, rare ones together; none may have probability zero."""
    seen, size = Counter(outputs), len(outputs)
    assert set(seen) <= set(law), "an output of probability zero was emitted"
    large = [output for output, mass in law.items() if mass * size >= 5.0]
    rest = 1.0 - sum(law[output] for output in large)
    expected = [law[output] * size for output in large]
    observed = [seen[output] for output in large]
    if rest > 1e-9:
        expected, observed = [*expected, rest * size], [*observed, size - sum(observed)]
    return float(stats.chisquare(observed, expected).pvalue)


class ScriptedController:
    """Decides for the next of `setups` every round; keeps the questions and the reports.

    `uneven`: every request has a length of its own, drawn up to the setup's.
    """

    def __init__(self, setups: Iterable[Setup], *, uneven: bool = False) -> None:
        self.finished: set[Hashable] = set()
        self._rng = random.Random(0) if uneven else None
        self.questions: list[tuple[int, int | None, str | None, float]] = []
        self.reports: list[RoundReport] = []
        self._setups = iter(setups)

    def choose(
        self,
        *,
        batch_size: int | None = None,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
        requests: Sequence[RequestInfo] = (),
        **_: object,
    ) -> RoundDecision:
        rows = batch_size or 1
        self.questions.append((rows, context_length, domain, temperature))
        setup = next(self._setups)
        point = rows, context_length or 0, domain or "mixed", temperature
        lengths = tuple(self._rng.randint(0, setup.length) for _ in requests) if self._rng else ()
        return RoundDecision(setup, True, *point, lengths=lengths, requests=tuple(requests))

    def observe(self, report: RoundReport) -> bool:
        self.reports.append(report)
        return True

    def finish(self, requests: Iterable[Hashable]) -> None:
        self.finished.update(requests)


def wandering(setups: Sequence[Setup], seed: int, longest: int = 1) -> Iterator[Setup]:
    """Setups at random without end, each for at most `longest` rounds."""
    rng = random.Random(seed)
    while True:
        yield from [rng.choice(setups)] * rng.randint(1, longest)


def run_toy_adaptive(
    target: TableModel,
    drafts: Mapping[Draft, TableModel],
    workload: Workload,
    prompts: Sequence[Prompt],
    controller: RoundController,
) -> AdaptiveRun:
    """Decodes a queue as `controller` says, with these model drafts and any look-up, up to 8 tokens a round."""
    draws = KeyedRandom(workload.batch_size, workload, target.device)
    models = {
        part.digest: model for draft, model in drafts.items() for part in draft.components if part.kind != "ngram"
    }

    def make(part: Draft) -> ModelDrafter | NgramDrafter:
        if part.kind == "ngram":
            return NgramDrafter(workload.batch_size, part.max_match or 0, part.min_match or 0)
        return ModelDrafter(models[part.digest].rows(workload.batch_size), draws)

    drafter = SwitchableDrafter(make, 8)
    decoder = Decoder(target.rows(workload.batch_size), drafter, draws, length=8)
    return AdaptiveLoop(decoder, drafter, controller).run(prompts, Clock("cpu"))
