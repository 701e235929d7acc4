"""Which rounds of llama.cpp are timed: the requests to each server, and the rounds of them that count.

A text that repeats itself is continued by a token that the sampler is biased to. With synthetic acceptance rates of 1 a
look-up then finds the next repeat, and a draft model drafts in full, in every round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.llamacpp.responses import LlamaCompletion
from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.errors import EngineError

FIRST_TOKEN = 32  # of the pattern: no known tokenizer has a special token from there on
LOGIT_BIAS = 1000.0
SKIPPED = 2  # rounds after a prefill, whose traces are still in the processor's caches
MIN_SAMPLES, MIN_S, MAX_TRIES = 4, 0.15, 12  # of a visit: rounds, their seconds, requests
PASSES = 2  # each there and back
STAGGER, STAGGER_TOKENS = 8, 24  # rounds by which a full batch may start late, more of them where they are short
_LOOK_UP = Draft(kind="ngram", max_match=1, min_match=1)
_NO_MATCH = Setup(draft=Draft(kind="ngram", max_match=2, min_match=2), length=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Rounds that verify `width` tokens, timed for `components` (digests); `args` are further ones of the server."""

    components: tuple[str, ...]
    width: int
    setup: Setup = PLAIN
    args: tuple[str, ...] = ()
    period: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows, the tokens cached in each halfway, and the most that a row can hold."""

    batch_size: int
    context_length: int
    max_tokens: int


def plan_of(target: Model, drafts: Sequence[Draft], max_length: int, *, has_synthetic_rates: bool) -> list[Visit]:
    """Everything to time in one pass, shortest drafts first; plain rounds at its start and in the middle."""
    plain = Visit(components=(target.run_digest,), width=1)
    look_ups = tuple(draft.digest for draft in drafts if draft.kind == "ngram")
    plan = [plain]
    if look_ups:  # all look-ups cost the same and are timed once
        plan.append(Visit(components=look_ups, width=1, setup=_NO_MATCH))
    timed: list[tuple[tuple[str, ...], Draft]] = [((draft.digest,), draft) for draft in drafts if draft.kind == "model"]
    timed += [(look_ups, _LOOK_UP)] if look_ups else []
    for length in range(1, max_length + 1):
        args = ("--spec-synth-rates", ",".join(["1"] * length)) if has_synthetic_rates else ()
        for components, draft in timed:
            setup = Setup(draft=draft, length=length)
            plan.append(Visit(components=components, width=length + 1, setup=setup, args=args, period=length + 1))
    plan.insert(len(plan) // 2, plain)
    return plan


def pattern(period: int, num_tokens: int) -> list[int]:
    """`period` different tokens repeated; the last of the period follows them."""
    return [FIRST_TOKEN + (position - num_tokens - 1) % period for position in range(num_tokens)]


def body_of(visit: Visit, shape: Shape) -> dict[str, Any]:
    """The request of every row: a prompt that stays cached, and enough tokens for the rounds."""
    num_rounds = SKIPPED + MIN_SAMPLES + 1
    if shape.batch_size > 1:
        num_rounds += max(STAGGER, STAGGER_TOKENS // visit.width)
    min_prompt = 3 * visit.period
    num_new = min(1 + num_rounds * visit.width, shape.max_tokens - min_prompt - visit.width)
    num_prompt = min(shape.context_length - num_new // 2, shape.max_tokens - num_new - visit.width)
    return {
        "prompt": pattern(visit.period, max(min_prompt, num_prompt)),
        "n_predict": num_new,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "logit_bias": [[FIRST_TOKEN + visit.period - 1, LOGIT_BIAS]],
        "ignore_eos": True,
        "cache_prompt": True,
        "return_tokens": True,
        "timings_per_token": True,
    }


def full_rounds(runs: Sequence[LlamaCompletion], width: int) -> list[float]:
    """Seconds of the rounds of that width in which every row took part, without the first ones.

    All rows of a batch take the same steps, so the row with the most of them is read.
    """
    start_s, end_s = max(run.first_s for run in runs), min(run.last_s for run in runs)
    return max((_rounds_within(run, start_s, end_s, width) for run in runs), key=len)[SKIPPED:]


def _rounds_within(run: LlamaCompletion, start_s: float, end_s: float, width: int) -> list[float]:
    starts = [run.first_s, *(step.arrived_s for step in run.steps)]
    return [
        step.seconds
        for began_s, step in zip(starts, run.steps, strict=False)
        if start_s <= began_s and step.arrived_s <= end_s and step.rounds == 1 and step.proposed + 1 == width
    ]


def time_plan(
    plan: Sequence[Visit], shape: Shape, measure: Callable[[Visit], list[float]]
) -> dict[str, dict[int, list[float]]]:
    """Seconds of rounds by component and width: passes over the plan and back, in which a drift of the machine cancels.

    The rounds of a visit may all fall into one slow moment: medians are over several passes. A draft that fails is left
    out. Raises EngineError: plain decoding fails.
    """
    samples: dict[str, dict[int, list[float]]] = {}
    failed: set[str] = set()
    for visit in PASSES * (*plan, *reversed(plan)):
        if failed.issuperset(visit.components):
            continue
        try:
            seconds = _time_visit(visit, shape, measure)
        except EngineError:
            if visit.setup == PLAIN:
                raise
            failed.update(visit.components)
            continue
        for component in visit.components:
            samples.setdefault(component, {}).setdefault(visit.width, []).extend(seconds)
    return {component: by_width for component, by_width in samples.items() if component not in failed}


def _time_visit(visit: Visit, shape: Shape, measure: Callable[[Visit], list[float]]) -> list[float]:
    """Seconds of a visit's rounds. Raises EngineError: too few of them."""
    seconds: list[float] = []
    for _ in range(MAX_TRIES):
        if len(seconds) < MIN_SAMPLES or sum(seconds) < MIN_S:
            seconds += measure(visit)
    if len(seconds) < MIN_SAMPLES:
        needed = f"{MIN_SAMPLES} full rounds of {visit.width} tokens at batch {shape.batch_size}"
        raise EngineError(f"{visit.setup.name}: of {needed} llama.cpp ran {len(seconds)}")
    return seconds
