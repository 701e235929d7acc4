"""How rounds of llama.cpp are timed: what is asked of which server, and which of its rounds count.

A text that repeats itself is continued by a token that the sampler is told to take. Accepted by made-up rates of 1, a
look-up then finds the next repeat, and a draft model drafts in full, in every round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.llamacpp.responses import Generated, Step
from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.errors import EngineError
from profiles.records.evidence import StepTimes

FIRST_TOKEN = 32  # of the pattern: no tokenizer known has a special token from there on
FORCED = 1000.0  # added to a logit
SKIPPED = 2  # rounds after a prefill, whose traces are still in the processor's caches
LEAST_SAMPLES, LEAST_S, MOST_TRIES = 4, 0.15, 12  # of a visit: rounds, their seconds, requests
PASSES = 2  # each there and back
STAGGER, STAGGER_TOKENS = 8, 24  # rounds a full batch may start late, more of them where they are short
_LOOK_UP = Draft(kind="ngram", max_match=1, min_match=1)
_NO_MATCH = Setup(draft=Draft(kind="ngram", max_match=2, min_match=2), length=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Rounds that verify `width` tokens, timed for `parts` (digests); `words` are more arguments of the server."""

    parts: tuple[str, ...]
    width: int
    setup: Setup = PLAIN
    words: tuple[str, ...] = ()
    period: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows, the tokens cached in each halfway, and the most that a row can hold."""

    batch_size: int
    context_length: int
    most_tokens: int


def plan_of(target: Model, drafts: Sequence[Draft], max_length: int, has_synthetic: bool) -> list[Timed]:
    """Everything to time in one pass, shortest drafts first; plain rounds at its start and in the middle."""
    plain = Timed(parts=(target.run_digest,), width=1)
    look_ups = tuple(draft.digest for draft in drafts if draft.kind == "ngram")
    plan = [plain]
    if look_ups:
        plan.append(Timed(parts=look_ups, width=1, setup=_NO_MATCH))
    for length in range(1, max_length + 1):
        words = ("--spec-synth-rates", ",".join(["1"] * length)) if has_synthetic else ()
        pairs: list[tuple[tuple[str, ...], Draft]] = [
            ((draft.digest,), draft) for draft in drafts if draft.kind == "model"
        ]
        pairs += [(look_ups, _LOOK_UP)] if look_ups else []
        for parts, draft in pairs:
            setup = Setup(draft=draft, length=length)
            plan.append(Timed(parts=parts, width=length + 1, setup=setup, words=words, period=length + 1))
    plan.insert(len(plan) // 2, plain)
    return plan


def pattern(period: int, num_tokens: int) -> list[int]:
    """`period` different tokens over and over; what follows them is the last of the period."""
    return [FIRST_TOKEN + (place - num_tokens - 1) % period for place in range(num_tokens)]


def body_of(asked: Timed, shape: Shape) -> dict[str, Any]:
    """The request of every row: a prompt that stays cached, and enough tokens for the rounds."""
    num_rounds = SKIPPED + LEAST_SAMPLES + 1
    if shape.batch_size > 1:
        num_rounds += max(STAGGER, STAGGER_TOKENS // asked.width)
    wanted = 1 + num_rounds * asked.width
    least_prompt = 3 * asked.period
    num_new = min(wanted, shape.most_tokens - least_prompt - asked.width)
    num_prompt = min(shape.context_length - num_new // 2, shape.most_tokens - num_new - asked.width)
    return {
        "prompt": pattern(asked.period, max(least_prompt, num_prompt)),
        "n_predict": num_new,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "logit_bias": [[FIRST_TOKEN + asked.period - 1, FORCED]],
        "ignore_eos": True,
        "cache_prompt": True,
        "return_tokens": True,
        "timings_per_token": True,
    }


def full_rounds(runs: Sequence[Generated], width: int) -> list[float]:
    """Seconds of the rounds of that width in which every row took part, the first ones left out.

    All rows of a batch take the same steps, so one row tells them: that with the most.
    """
    start_s, end_s = max(run.first_s for run in runs), min(run.last_s for run in runs)
    return max(([step.seconds for step in _within(run, start_s, end_s, width)] for run in runs), key=len)[SKIPPED:]


def _within(run: Generated, start_s: float, end_s: float, width: int) -> list[Step]:
    begins = [run.first_s, *(step.arrived_s for step in run.steps)]
    return [
        step
        for began_s, step in zip(begins, run.steps, strict=False)
        if start_s <= began_s and step.arrived_s <= end_s and step.rounds == 1 and step.proposed + 1 == width
    ]


def time_plan(plan: Sequence[Timed], shape: Shape, measure: Callable[[Timed], list[float]]) -> dict[str, StepTimes]:
    """The staircases of all parts, from passes over the plan and back, in which a drift of the machine cancels.

    A visit's rounds may all fall into one slow moment of the machine: medians are over several passes.
    Raises EngineError: a width of which no rounds could be had.
    """
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    for asked in PASSES * (*plan, *reversed(plan)):
        seconds: list[float] = []
        for _ in range(MOST_TRIES):
            if len(seconds) < LEAST_SAMPLES or sum(seconds) < LEAST_S:
                seconds += measure(asked)
        if len(seconds) < LEAST_SAMPLES:
            raise EngineError(
                f"{asked.setup.name}: of {LEAST_SAMPLES} full rounds of {asked.width} tokens at batch "
                f"{shape.batch_size} llama.cpp ran {len(seconds)}"
            )
        for part in asked.parts:
            widths = found.setdefault(part, {})
            widths[asked.width] = widths.get(asked.width, ()) + tuple(seconds)
    return {
        part: StepTimes(
            component_digest=part,
            batch_size=shape.batch_size,
            context_length=shape.context_length,
            samples_s=samples,
        )
        for part, samples in found.items()
    }
