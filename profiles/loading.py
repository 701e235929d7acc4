"""From what a user names to an engine and its workloads: everything that is refused is refused here, before any run.

Loads target and drafts, checks that they fit each other, the device and the asked contexts, and reads the prompts.
Knows nothing of what will be measured.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from profiles import environment, memory, models, prompts
from profiles.drafting import DraftSource
from profiles.engine import TorchEngine
from profiles.errors import InputError, ModelError, OutOfMemoryError
from profiles.memory import cached_values_per_token
from profiles.prompts import Request
from profiles.protocol import Engine
from profiles.sizes import Footprint, cache_slots
from profiles.sources import find
from profiles.spelling import MAX_BATCH, MAX_REQUESTS, DraftSpec, Refused
from profiles.terms import DTYPES, Draft, Prompt, Setup, Workload

CONTEXT_STEP = 64  # a context that follows from the prompts is rounded up to a multiple of this


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
    loaded: tuple[models.Described, ...]
    footprints: Mapping[Draft | None, Footprint] = field(default_factory=dict)
    refused: tuple[Refused, ...] = ()
    close: Callable[[], None] = lambda: None

    def needed_bytes(self, setup: Setup, workload: Workload) -> int | None:
        """Weights and caches as allocated of the target and the setup's draft, in bytes; activations come on top.

        None where that is not known.
        """
        if not self.footprints:
            return None
        num_tokens = workload.batch_size * cache_slots(workload.context_length)
        return sum(self.footprints[part].total_bytes(num_tokens) for part in {None, setup.draft})


def load(target: str, specs: Sequence[DraftSpec], dtype: str | None, device: str | None, num_tokens: int = 0) -> Bench:
    """The engine over a target and its drafts; `dtype` None is float32 on a CPU and bfloat16 on a GPU.

    `num_tokens`: cached tokens that must fit in memory beside the weights. A draft that cannot be used is refused and
    the others go on.

    Raises: InputError: an unknown device or dtype. ModelError: the target cannot be loaded or does not fit in memory.
    The first draft's error, when there are drafts and none can be used.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    place = environment.pick_device(device)
    chosen = dtype or ("float32" if place == "cpu" else "bfloat16")
    free = environment.free_bytes_of_all(place)  # a target may be spread over several GPUs
    memory.check_memory([target], dtype=chosen, device=place, num_tokens=num_tokens, num_free_bytes=free)
    by_name = {target: models.load(target, dtype=chosen, device=place)}
    sources: dict[str, DraftSource] = {}
    errors: dict[str, ModelError | OutOfMemoryError] = {}
    for spec in specs:
        if spec.kind == "composite" and spec.path in errors:
            continue  # its model is refused already, which is said once
        if spec.kind == "native":
            raise InputError(f"draft {spec.name!r}: only a serving engine has it; --engine says which")
        try:
            if spec.path is not None and spec.path not in by_name:
                memory.check_memory([spec.path], dtype=chosen, device=place, num_tokens=num_tokens)
                loaded = models.load(spec.path, dtype=chosen, device=place, several_gpus=False)
                models.check_pair(by_name[target], loaded)
                by_name[spec.path] = loaded
            source = _source(spec, by_name, by_name[target])
            sources.setdefault(source.draft.digest, source)
        except (ModelError, OutOfMemoryError) as error:
            errors[spec.name] = error
    if errors and not sources:
        raise next(iter(errors.values()))
    refused = [Refused(name=name, reason=type(error).__name__, detail=str(error)) for name, error in errors.items()]
    prints: dict[Draft | None, Footprint] = {None: memory.footprint(find(target), chosen)}
    prints |= {source.draft: _footprint(source, by_name[target]) for source in sources.values()}
    return Bench(
        engine=TorchEngine(by_name[target], tuple(sources.values()), place),
        loaded=tuple(by_name.values()),
        footprints=prints,
        refused=tuple(refused),
    )


def _source(spec: DraftSpec, by_name: dict[str, models.Loaded], target: models.Loaded) -> DraftSource:
    if spec.path is not None:
        loaded = by_name[spec.path]
        draft = Draft(kind=spec.kind, model=loaded.record, max_match=spec.max_match, min_match=spec.min_match)
        return DraftSource(draft=draft, model=loaded.model)
    if spec.num_layers is not None:
        draft = Draft(kind="early_exit", num_layers=spec.num_layers)
        return DraftSource(draft=draft, model=models.early_exit(target, spec.num_layers))
    return DraftSource(draft=Draft(kind="ngram", max_match=spec.max_match, min_match=spec.min_match), model=None)


def _footprint(source: DraftSource, target: models.Loaded) -> Footprint:
    """What a draft adds: an early exit has the target's weights, a look-up next to nothing."""
    if source.model is None:
        return Footprint(weight_bytes=0, cache_bytes_per_token=0)
    size = getattr(torch, target.record.dtype).itemsize
    shares_weights = not source.draft.has_weights or source.model is target.model
    own = 0 if shares_weights else sum(parameter.numel() for parameter in source.model.parameters())
    return Footprint(weight_bytes=size * own, cache_bytes_per_token=size * cached_values_per_token(source.model.config))


def workloads(
    bench: Bench, question: Question, sources: Sequence[str], domain: str | None = None
) -> tuple[list[tuple[Workload, tuple[Prompt, ...]]], list[str]]:
    """As `workloads_of`, from prompt sources; `domain` labels all prompts. Raises PromptError for a bad source."""
    requests = [request for source in sources for request in prompts.read(source, domain=domain)]
    return workloads_of(bench, question, requests)


def workloads_of(
    bench: Bench, question: Question, requests: Sequence[Request]
) -> tuple[list[tuple[Workload, tuple[Prompt, ...]]], list[str]]:
    """Every batch size and context as a workload with its prompts, and warnings.

    Prompts are cut to what the context leaves beside the new tokens; a context they do not fill shrinks to what they
    do, so that no row claims a length that was never run. Raises ModelError when a model has no room for
    a context and the longest speculation length, PromptError for prompts that cannot be used, InputError for a way to
    sample that the engine does wrongly with drafts.
    """
    target, longest = bench.loaded[0], max(question.lengths)
    room = min(loaded.max_positions for loaded in bench.loaded) - longest
    loads: dict[int, tuple[Prompt, ...]] = {}
    warnings: list[str] = []
    for context in question.contexts or (None,):
        _check_room(bench, question, context)
        most_tokens = (context or room) - question.max_new_tokens
        tokenized, notes = prompts.tokenize(requests, target.tokenizer, most_tokens)
        warnings += notes
        needed = max(len(prompt.token_ids) for prompt in tokenized) + question.max_new_tokens
        fitting = min(room, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
        if context is not None and context > fitting:
            warnings.append(f"context {context}: these prompts fill only {fitting} tokens, which is what is measured")
        loads[min(context or fitting, fitting)] = tuple(tokenized)
    ends = target.end_token_ids
    anchors = itertools.product(question.batch_sizes, loads.items())
    found = [(question.workload(context, ends, size), tokenized) for size, (context, tokenized) in anchors]
    objection = bench.engine.properties.objection(found[0][0], drafting=bool(bench.engine.drafts))
    if objection is not None:
        raise InputError(objection)
    return found, warnings


def _check_room(bench: Bench, question: Question, context: int | None) -> None:
    """Refuses a context, or where none is asked the output length, that some model has no positions for."""
    try:
        for loaded in bench.loaded:
            asked = context or question.max_new_tokens + 1
            models.check_room(loaded, context_length=asked, max_length=max(question.lengths))
    except ModelError as error:
        if context is not None:
            raise
        raise ModelError(f"max-new-tokens {question.max_new_tokens} and a prompt: {error}") from error
