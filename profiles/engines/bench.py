"""Split from profiles.engines.workloads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from profiles.engines.base import Engine
from profiles.models import loader
from profiles.models.footprint import Footprint, cache_slots
from profiles.records.core import Draft, Setup, Workload
from profiles.records.draft_spec import MAX_BATCH, MAX_REQUESTS, RefusedDraft
from profiles.records.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked apart from models and prompts; no contexts means: what the prompts need."""

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
        most = MAX_BATCH if self.engine == "torch" else MAX_REQUESTS
        for size in self.batch_sizes:
            if not 1 <= size <= most:
                raise InputError(f"batch size {size}: the {self.engine} engine takes 1 to {most} rows at a time")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: whole numbers from 0 are allowed")
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
    """An engine and the models it runs, the target first; what each draft adds to memory; drafts that were refused.

    `close` ends what the engine started. Footprints are empty where another engine allocates as it likes.
    """

    engine: Engine
    loaded: tuple[loader.DescribedModel, ...]
    footprints: Mapping[Draft | None, Footprint] = field(default_factory=dict)
    refused: tuple[RefusedDraft, ...] = ()
    close: Callable[[], None] = lambda: None

    def needed_bytes(self, setup: Setup, workload: Workload) -> int | None:
        """Weights and caches as allocated of the target and the setup's draft, in bytes; activations come on top.

        None where that is not known.
        """
        if not self.footprints:
            return None
        num_tokens = workload.batch_size * cache_slots(workload.context_length)
        return sum(self.footprints[part].total_bytes(num_tokens) for part in {None, setup.draft})
