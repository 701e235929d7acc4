"""What is to be measured, and the engine with its models to measure it on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from profiles.engines.base import Engine
from profiles.models import loader
from profiles.models.footprint import Footprint, cache_slots
from profiles.records.core import Draft, Setup, Workload
from profiles.records.draft_spec import MAX_BATCH, MAX_REQUESTS, RefusedDraft
from profiles.records.errors import InputError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to measure apart from models and prompts; no contexts: the one that the prompts need."""

    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    engine: str = "torch"

    def __post_init__(self) -> None:
        max_batch = MAX_BATCH if self.engine == "torch" else MAX_REQUESTS
        for size in self.batch_sizes:
            if not 1 <= size <= max_batch:
                raise InputError(f"batch size {size}: the {self.engine} engine takes 1 to {max_batch} rows at a time")
        require(self.seed >= 0, f"seed {self.seed}: whole numbers from 0 are allowed")
        for context in self.contexts or (self.max_new_tokens + 1,):
            self.workload(context, ())

    def workload(self, context_length: int, end_token_ids: tuple[int, ...], batch_size: int = 1) -> Workload:
        """The workload at one context and batch size. Raises InputError when a value is not allowed."""
        return Workload(
            batch_size=batch_size,
            context_length=context_length,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            end_token_ids=end_token_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An engine and the models it runs, the target first.

    `footprints`: what the target (None) and each draft add to memory; empty where the engine allocates by itself.
    """

    engine: Engine
    loaded: tuple[loader.DescribedModel, ...]
    footprints: Mapping[Draft | None, Footprint] = field(default_factory=dict)
    refused: tuple[RefusedDraft, ...] = ()  # drafts that cannot be used, with reasons
    close: Callable[[], None] = lambda: None  # ends what the engine started
    notes: tuple[str, ...] = ()

    def needed_bytes(self, setup: Setup, workload: Workload) -> int | None:
        """Bytes of weights and caches of the target and the setup's draft, without activations; None if not known."""
        if not self.footprints:
            return None
        num_tokens = workload.batch_size * cache_slots(workload.context_length)
        return sum(self.footprints[draft].total_bytes(num_tokens) for draft in {None, setup.draft})
