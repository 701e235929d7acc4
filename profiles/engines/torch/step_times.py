"""Step times: how long a step of a whole batch takes at each width, for the target and every draft, in turn.

All components and widths are visited once per cycle in a shuffled order, so that drift of the machine falls on all
alike. What is timed is what a round does: run the forward, choose, and for the target bring the choice to the host.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from profiles.acceptance.ngram import NgramIndex
from profiles.engines.torch.batch_model import RowStepper
from profiles.records.core import CATCH_UP_WIDTHS, Draft
from profiles.records.evidence import StepTimes
from profiles.timing.clock import Clock

WARM_UP_CYCLES = 3
CYCLES = 24
CHAIN = 4  # a draft's single-token steps follow each other: so many are timed together


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is timed, by component digest: the target, draft models, look-ups; and at which sizes.

    `context_length` tokens are cached in every row; `max_length` is the longest speculation length.
    """

    target: tuple[str, RowStepper]
    models: Mapping[str, RowStepper]
    lookups: Mapping[str, Draft]
    batch_size: int
    context_length: int
    max_length: int


class _TimedStep(NamedTuple):
    """A step, or `repeats` of them in a row."""

    component: str
    width: int
    run: Callable[[], object]
    repeats: int = 1


def time_steps(sweep: Sweep, clock: Clock) -> dict[str, StepTimes]:
    """Step times by component digest.

    The target is timed at widths 1..max_length+1; a draft model at 1 (a single-token step among others) and as wide as
    a first step can be, because a draft that is switched to may be any number of tokens behind; a look-up in every row
    at limits of 1..max_length tokens.
    """
    with torch.inference_mode():
        steps = _steps(sweep)
        samples = _run_cycles(steps, clock)
    return {
        component: StepTimes(
            component_digest=component,
            batch_size=sweep.batch_size,
            context_length=sweep.context_length,
            samples_s={width: tuple(values) for (owner, width), values in samples.items() if owner == component},
        )
        for component in dict.fromkeys(step.component for step in steps)
    }


def _steps(sweep: Sweep) -> list[_TimedStep]:
    context_length, lengths = sweep.context_length, range(1, sweep.max_length + 1)
    token_ids = [index % 97 for index in range(context_length)]
    digest, target = sweep.target
    _fill(target, token_ids)
    steps = [
        _TimedStep(digest, width, _verify(target, context_length, width)) for width in (*lengths, len(lengths) + 1)
    ]
    for digest, model in sweep.models.items():
        _fill(model, token_ids)
        steps += [_TimedStep(digest, width, _first_step(model, context_length, width)) for width in CATCH_UP_WIDTHS]
        steps.append(_TimedStep(digest, 1, _single_steps(model, context_length), CHAIN))
    for digest, draft in sweep.lookups.items():
        steps += [_TimedStep(digest, limit, _look_up(draft, token_ids, limit, sweep.batch_size)) for limit in lengths]
    return steps


def _fill(model: RowStepper, token_ids: list[int]) -> None:
    """Puts the same text into every row."""
    tokens = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(len(token_ids), device=model.device)[None]
    for row in range(model.num_rows):
        model.step(tokens, positions, len(token_ids), row=row)


def _inputs(model: RowStepper, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions, (B, width)."""
    positions = torch.arange(start, start + width, device=model.device).expand(model.num_rows, -1)
    return torch.zeros_like(positions), positions


def _verify(model: RowStepper, context_length: int, width: int) -> Callable[[], object]:
    tokens, positions = _inputs(model, context_length, width)
    return lambda: model.step(tokens, positions, context_length + width, keep=width).argmax(-1).tolist()


def _first_step(model: RowStepper, context_length: int, width: int) -> Callable[[], object]:
    tokens, positions = _inputs(model, max(0, context_length - width), width)
    return lambda: model.step(tokens, positions, max(context_length, width))[:, 0].argmax(-1)


def _single_steps(model: RowStepper, context_length: int) -> Callable[[], object]:
    tokens, positions = _inputs(model, context_length, 1)

    def run() -> None:
        token = tokens
        for ahead in range(CHAIN):
            token = model.step(token, positions + ahead, context_length + ahead + 1).argmax(-1)

    return run


def _look_up(draft: Draft, token_ids: list[int], limit: int, num_rows: int) -> Callable[[], object]:
    assert draft.max_match is not None
    assert draft.min_match is not None
    indexes = [NgramIndex(draft.max_match, draft.min_match) for _ in range(num_rows)]
    return lambda: [index.look_up(token_ids, limit) for index in indexes]


def _run_cycles(steps: list[_TimedStep], clock: Clock) -> dict[tuple[str, int], list[float]]:
    samples: dict[tuple[str, int], list[float]] = {(step.component, step.width): [] for step in steps}
    rng = random.Random(0)
    for cycle in range(WARM_UP_CYCLES + CYCLES):
        for step in rng.sample(steps, len(steps)):
            started_s = clock.read()
            step.run()
            elapsed_s = clock.read() - started_s
            if cycle >= WARM_UP_CYCLES:
                samples[step.component, step.width].append(elapsed_s / step.repeats)
    return samples
