"""Tells in seconds whether drafts fit a target: tokens, positions, memory, and a first look at acceptance.

Loads what a run would load and looks at a few short outputs; nothing is timed and nothing kept. How it is shown it
must not know.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from profiles.acceptance.expected_rounds import expected_rounds, joined
from profiles.acceptance.rates import acceptance_length, acceptance_rate
from profiles.builtin import ALL_PROMPTS
from profiles.engines.bench import Bench
from profiles.engines.torch import load
from profiles.fit.report import DraftCheck, Glance, PairReport
from profiles.hardware import fingerprint
from profiles.models import loader, memory, sources
from profiles.models.footprint import Footprint
from profiles.models.loader import DescribedModel
from profiles.prompts import reader
from profiles.prompts.reader import Request
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.draft_spec import NGRAM_DEFAULTS, DraftSpec
from profiles.records.errors import DraftpickError, InputError, ModelError, PairError
from profiles.records.evidence import RoundCount, TargetTrace

NUM_PROMPTS, MOST_PROMPT_TOKENS, NEW_TOKENS, LENGTH = 3, 512, 32, 4
DEFAULT_CONTEXT = 4096  # tokens; less where the target has fewer positions
LOOKUP = DraftSpec(kind="ngram", max_match=NGRAM_DEFAULTS["max"], min_match=NGRAM_DEFAULTS["min"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory is told for; no context means 4,096 tokens, or the target's positions.

    `dtype` and `device` None: as `run` chooses them. Raises InputError when a number is under 1.
    """

    batch_size: int = 1
    context_length: int | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size}: at least 1 is needed")
        if self.context_length is not None and self.context_length < 1:
            raise InputError(f"context {self.context_length}: at least 1 token is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """The target's short outputs, and the shape that positions are checked for."""

    workload: Workload
    traces: tuple[tuple[Prompt, TargetTrace], ...]
    shape: Shape


def check(target: str, specs: Sequence[DraftSpec], shape: Shape, requests: Sequence[Request] = ()) -> PairReport:
    """What fits and what does not; without requests the glance is at prompts that ship.

    A draft that cannot be used has its reason in its row. Prompt look-up always gets a row, last unless asked for: it
    costs nothing, so a draft should beat it.

    Raises: InputError, ModelError: an unknown device or dtype, or a target that cannot be loaded, lacks the positions
    or does not fit in memory. PromptError: prompts that cannot be used. EngineError: the target fails while it runs.
    """
    specs = list(dict.fromkeys([*specs, LOOKUP]))
    context = shape.context_length or min(DEFAULT_CONTEXT, _from_header(target, "float32")[0] or DEFAULT_CONTEXT)
    free = fingerprint.free_bytes(fingerprint.pick_device(shape.device))
    bench = load.load(target, specs, shape.dtype, shape.device, shape.batch_size * context)
    loader.check_context(bench.loaded[0], context_length=context, max_length=0)
    workload, traces, warnings = _look(bench, requests)
    look = _Look(workload=workload, traces=traces, shape=shape)
    notes = [loaded.note for loaded in bench.loaded if loaded.note is not None]
    little = f"acceptance at k={LENGTH} over {len(traces)} prompts says little: `tune.py run` measures it"
    return PairReport(
        target=target,
        dtype=bench.engine.target.dtype,
        device=bench.engine.environment.device,
        batch_size=shape.batch_size,
        context_length=context,
        max_positions=bench.loaded[0].max_positions,
        need=bench.footprints[None],
        free_bytes=free,
        drafts=tuple(_row(bench, spec, look) for spec in specs),
        notes=(*notes, *warnings, little),
    )


def _from_header(name: str, dtype: str) -> tuple[int | None, Footprint | None]:
    """(positions, footprint) of a model that is not loaded; None where its files do not say."""
    try:
        source = sources.find(name)
        footprint = memory.footprint(source, dtype)
        with sources.library_errors(f"model {name!r}"):
            return sources.max_positions(sources.read_config(source), source), footprint
    except ModelError:
        return None, None


def _look(
    bench: Bench, requests: Sequence[Request]
) -> tuple[Workload, tuple[tuple[Prompt, TargetTrace], ...], list[str]]:
    """A few short greedy outputs of the target, on prompts of as many domains as there are, and warnings."""
    target = bench.loaded[0]
    chosen = _spread(requests or reader.read(ALL_PROMPTS))
    room = min(MOST_PROMPT_TOKENS, target.max_positions - NEW_TOKENS - LENGTH)
    tokenized, warnings = reader.tokenize(chosen, target.tokenizer, room)
    longest = max(len(prompt.token_ids) for prompt in tokenized)
    workload = Workload(
        context_length=longest + NEW_TOKENS, max_new_tokens=NEW_TOKENS, end_token_ids=target.end_token_ids
    )
    return workload, tuple((prompt, bench.engine.trace_target(workload, prompt)) for prompt in tokenized), warnings


def _spread(requests: Sequence[Request]) -> list[Request]:
    """At most three: the first of each domain, then the second of each."""
    seen: Counter[str] = Counter()
    ranked = []
    for index, request in enumerate(requests):
        ranked.append((seen[request.domain], index, request))
        seen[request.domain] += 1
    return [request for _, _, request in sorted(ranked, key=lambda one: one[:2])[:NUM_PROMPTS]]


def _row(bench: Bench, spec: DraftSpec, look: _Look) -> DraftCheck:
    """One draft's row: what could be found out, and the first reason against it."""
    # a composite is refused with its model, which is named once
    problem = next((refused for refused in bench.refused if refused.name in (spec.name, spec.path)), None)
    if problem is not None:
        differs = problem.reason == PairError.__name__ and spec.path is not None
        positions, footprint = _from_header(spec.path, bench.engine.target.dtype) if spec.path else (None, None)
        return DraftCheck(
            name=spec.name,
            same_tokens=False if differs else None,
            max_positions=positions,
            need=footprint,
            glance=None,
            problem=problem.detail,
        )
    draft, loaded = _found(bench, spec)
    glance = reason = None
    try:
        if loaded is not None:
            loader.check_context(loaded, context_length=look.shape.context_length or 1, max_length=0)
            loader.check_context(loaded, context_length=look.workload.context_length, max_length=LENGTH)
        glance = _glance(bench, draft, look)
    except DraftpickError as error:
        reason = str(error)
    return DraftCheck(
        name=spec.name,
        same_tokens=True,
        max_positions=None if loaded is None else loaded.max_positions,
        need=bench.footprints[draft],
        glance=glance,
        problem=reason,
    )


def _found(bench: Bench, spec: DraftSpec) -> tuple[Draft, DescribedModel | None]:
    """The draft that the engine has for it (equal weights under two names are one), and the model it runs."""
    loaded: DescribedModel | None
    if spec.path is not None:
        loaded = next(one for one in bench.loaded if one.record.name == spec.path)
    else:
        loaded = None if spec.num_layers is None else bench.loaded[0]
    asked = Draft(
        kind=spec.kind,
        model=None if spec.path is None or loaded is None else loaded.record,
        max_match=spec.max_match,
        min_match=spec.min_match,
        num_layers=spec.num_layers,
    )
    return next(draft for draft in bench.engine.drafts if draft.digest == asked.digest), loaded


def _glance(bench: Bench, draft: Draft, look: _Look) -> Glance:
    """Rounds of the walk over the short outputs; the target is not run again."""
    rounds: dict[RoundCount, float] = {}
    for prompt, trace in look.traces:
        acceptance = joined(
            [bench.engine.trace_draft(look.workload, prompt, trace, part, LENGTH) for part in draft.components]
        )
        for outcome, count in expected_rounds(trace, acceptance, LENGTH, NEW_TOKENS).rounds.items():
            rounds[outcome] = rounds.get(outcome, 0.0) + count
    return Glance(
        num_prompts=len(look.traces),
        num_tokens=sum(len(trace.token_ids) for _, trace in look.traces),
        length=LENGTH,
        acceptance_rate=acceptance_rate(rounds),
        acceptance_length=acceptance_length(rounds),
    )
