"""Checks whether drafts fit a target: tokens, positions, memory, and acceptance over a few short outputs.

Loads the models as a run does; nothing is timed or stored.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from profiles.acceptance.expected_rounds import combine, expected_rounds
from profiles.acceptance.rates import acceptance_length, acceptance_rate
from profiles.builtin import ALL_PROMPTS
from profiles.engines.bench import Bench
from profiles.engines.torch import load
from profiles.hardware import fingerprint
from profiles.models import loader
from profiles.models.footprint import Footprint
from profiles.models.loader import DescribedModel
from profiles.prompts import tokens
from profiles.prompts.reader import Request, read, sample
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.draft_spec import NGRAM_DEFAULTS, DraftSpec
from profiles.records.errors import DraftpickError, PairError, require
from profiles.records.evidence import RoundCount, TargetTrace
from profiles.records.text import command

NUM_PROMPTS, MAX_PROMPT_TOKENS, NEW_TOKENS, LENGTH = 3, 512, 32, 4
DEFAULT_CONTEXT = 4096  # tokens; less where the target has fewer positions
LOOKUP = DraftSpec(kind="ngram", max_match=NGRAM_DEFAULTS["max"], min_match=NGRAM_DEFAULTS["min"])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickAcceptance:
    """Acceptance over a few short outputs at one speculation length; None where no round was drafted."""

    num_prompts: int
    num_tokens: int
    length: int
    acceptance_rate: float | None  # accepted / drafted tokens
    acceptance_length: float | None  # 1 + accepted tokens / rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheck:
    """One draft; what is unknown is None."""

    name: str
    same_tokens: bool | None
    max_positions: int | None = None  # None for a draft without a model
    need: Footprint | None = None  # what the draft adds to the target's memory
    quick_acceptance: QuickAcceptance | None = None
    problem: str | None  # why it cannot be used


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A target and its drafts; `free_bytes` is the device's free memory before anything was loaded."""

    target: str
    dtype: str
    device: str
    batch_size: int
    context_length: int
    max_positions: int
    need: Footprint
    free_bytes: int
    drafts: tuple[DraftCheck, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens cached at the batch and context of the report."""
        return self.batch_size * self.context_length

    def to_json(self) -> dict[str, Any]:
        """JSON values only; every `need` has its `total_bytes`, and quick acceptance keeps its key of 0.5.0."""
        raw = asdict(self)
        for draft in raw["drafts"]:
            draft["glance"] = draft.pop("quick_acceptance")
        needs = (self.need, *(draft.need for draft in self.drafts))
        for entry, need in zip((raw, *raw["drafts"]), needs, strict=True):
            if need is not None:
                entry["need"]["total_bytes"] = need.total_bytes(self.num_tokens)
        return raw


Traces = Sequence[tuple[Prompt, TargetTrace]]  # short greedy outputs of the target


def check(
    target: str,
    specs: Sequence[DraftSpec],
    requests: Sequence[Request] = (),
    *,
    batch_size: int = 1,
    context_length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> FitReport:
    """What fits at a batch and context and what does not; without requests quick acceptance uses built-in prompts.

    Without a context 4,096 tokens, or the target's positions if fewer; data type and device default as in `run`.
    A draft that cannot be used has its reason in its row. Prompt look-up always gets a row, last unless it is among
    `specs`: it costs nothing, so a draft should beat it. Raises: InputError: an unknown device or dtype. ModelError:
    the target cannot be loaded, lacks the positions or does not fit in memory. PromptError: prompts that cannot be
    used. EngineError: the target fails while it runs.
    """
    require(batch_size >= 1, f"batch size {batch_size}: at least 1 is needed")
    require(context_length is None or context_length >= 1, f"context {context_length}: at least 1 token is needed")
    specs = list(dict.fromkeys([*specs, LOOKUP]))
    free = fingerprint.free_bytes(fingerprint.pick_device(device))
    num_tokens = batch_size * (context_length or DEFAULT_CONTEXT)
    bench = load.load(target, specs, dtype, device, num_tokens)
    context = context_length or min(DEFAULT_CONTEXT, bench.loaded[0].max_positions)
    loader.check_context(bench.loaded[0], context_length=context, max_length=0)
    workload, traces, warnings = _decode_briefly(bench, requests)
    notes = [loaded.note for loaded in bench.loaded if loaded.note is not None]
    caveat = f"acceptance at k={LENGTH} over {len(traces)} prompts says little: `{command('run')}` measures it"
    return FitReport(
        target=target,
        dtype=bench.engine.target.dtype,
        device=bench.engine.environment.device,
        batch_size=batch_size,
        context_length=context,
        max_positions=bench.loaded[0].max_positions,
        need=bench.footprints[None],
        free_bytes=free,
        drafts=tuple(_check_draft(bench, spec, workload, traces, context_length) for spec in specs),
        notes=(*notes, *warnings, caveat),
    )


def _decode_briefly(bench: Bench, requests: Sequence[Request]) -> tuple[Workload, Traces, list[str]]:
    """Short outputs on prompts of as many domains as there are, under which workload, and warnings."""
    target = bench.loaded[0]
    chosen = sample(requests or read(ALL_PROMPTS), NUM_PROMPTS, seed=0)
    max_tokens = min(MAX_PROMPT_TOKENS, target.max_positions - NEW_TOKENS - LENGTH)
    prompts, warnings = tokens.tokenize(chosen, target.tokenizer, max_tokens, vocab_size=target.num_tokens)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    workload = Workload(
        context_length=longest + NEW_TOKENS, max_new_tokens=NEW_TOKENS, end_token_ids=target.end_token_ids
    )
    return workload, [(prompt, bench.engine.trace_target(workload, prompt)) for prompt in prompts], warnings


def _check_draft(
    bench: Bench, spec: DraftSpec, workload: Workload, traces: Traces, context_length: int | None
) -> DraftCheck:
    """One draft's row, with the first reason against it."""
    # a composite is refused with its model, which is named once
    refused = next((refused for refused in bench.refused if refused.name in (spec.name, spec.path)), None)
    if refused is not None:
        other_tokens = refused.reason == PairError.__name__ and spec.path is not None
        same_tokens = False if other_tokens else None
        return DraftCheck(name=spec.name, same_tokens=same_tokens, problem=refused.detail)
    draft, model = _loaded_draft(bench, spec)
    acceptance = problem = None
    try:
        if model is not None:
            loader.check_context(model, context_length=context_length or 1, max_length=0)
            loader.check_context(model, context_length=workload.context_length, max_length=LENGTH)
        acceptance = _quick_acceptance(bench, draft, workload, traces)
    except DraftpickError as error:
        problem = str(error)
    return DraftCheck(
        name=spec.name,
        same_tokens=True,
        max_positions=None if model is None else model.max_positions,
        need=bench.footprints[draft],
        quick_acceptance=acceptance,
        problem=problem,
    )


def _loaded_draft(bench: Bench, spec: DraftSpec) -> tuple[Draft, DescribedModel | None]:
    """The engine's draft (equal weights under two names are one), and the model that it runs."""
    named = next((loaded for loaded in bench.loaded if loaded.record.name == spec.path), None)
    digest = spec.draft(None if named is None else named.record).digest
    draft = next(draft for draft in bench.engine.drafts if draft.digest == digest)
    return draft, bench.loaded[0] if spec.num_layers is not None else named


def _quick_acceptance(bench: Bench, draft: Draft, workload: Workload, traces: Traces) -> QuickAcceptance:
    """Expected rounds over the short outputs; the target is not run again."""
    rounds: defaultdict[RoundCount, float] = defaultdict(float)
    for prompt, trace in traces:
        parts = [bench.engine.trace_draft(workload, prompt, trace, part, LENGTH) for part in draft.components]
        for outcome, count in expected_rounds(trace, combine(parts), LENGTH, NEW_TOKENS).rounds.items():
            rounds[outcome] += count
    return QuickAcceptance(
        num_prompts=len(traces),
        num_tokens=sum(len(trace.token_ids) for _, trace in traces),
        length=LENGTH,
        acceptance_rate=acceptance_rate(rounds),
        acceptance_length=acceptance_length(rounds),
    )
