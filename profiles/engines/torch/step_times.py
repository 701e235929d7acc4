"""Staircases: how long a step of a whole batch takes at each width, for the target and every draft, in turn.

All parts and widths are visited once per cycle in a shuffled order, so that drift of the machine falls on all alike.
What is timed is what a round does: run the forward, choose, and for the target bring the choice to the host.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from profiles.acceptance.ngram import NgramIndex
from profiles.engines.torch.batch_model import RowStepper
from profiles.records.core import CATCH_UP_WIDTHS, Draft, Workload
from profiles.records.evidence import StepTimes
from profiles.timing.clock import Clock

WARM_UP_CYCLES = 3
CYCLES = 24
CHAIN = 4  # a draft's single-token steps come in a row: so many are timed together

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is timed: the target, draft models, look-ups; by part digest."""

    target: tuple[str, RowStepper]
    models: Mapping[str, RowStepper]
    lookups: Mapping[str, Draft]


def time_steps(parts: Parts, workload: Workload, shape: tuple[int, int], clock: Clock) -> dict[str, StepTimes]:
    """Staircases by part digest; `shape` is (context tokens cached in every row, longest speculation length).

    The target is timed at widths 1..length+1; a draft model at 1 (a single-token step among others) and as wide as
    a first step can be, because a draft that is switched to may be any number of tokens behind; a look-up in every row
    at 1..length asked tokens.
    """
    context_length, max_length = shape
    token_ids = [index % 97 for index in range(context_length)]
    steps: list[tuple[str, int, Step, int]] = []
    with torch.inference_mode():
        part, target = parts.target
        _fill(target, token_ids)
        steps += [(part, width, _forward(target, context_length, width), 1) for width in range(1, max_length + 2)]
        for part, model in parts.models.items():
            _fill(model, token_ids)
            steps += [(part, width, _first_step(model, context_length, width), 1) for width in CATCH_UP_WIDTHS]
            steps.append((part, 1, _chain(model, context_length), CHAIN))
        for part, draft in parts.lookups.items():
            steps += [
                (part, asked, _look_up(draft, token_ids, asked, workload.batch_size), 1)
                for asked in range(1, max_length + 1)
            ]
        samples = _cycle(steps, clock)
    return {
        part: StepTimes(
            component_digest=part,
            batch_size=workload.batch_size,
            context_length=context_length,
            samples_s={width: tuple(values) for (owner, width), values in samples.items() if owner == part},
        )
        for part in dict.fromkeys(step[0] for step in steps)
    }


def _fill(model: RowStepper, token_ids: list[int]) -> None:
    """Puts the same text into every row."""
    tokens = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(len(token_ids), device=model.device)[None]
    for row in range(model.num_rows):
        model.step(tokens, positions, len(token_ids), row=row)


def _inputs(model: RowStepper, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(start, start + width, device=model.device).expand(model.num_rows, -1)
    return torch.zeros_like(positions), positions


def _forward(model: RowStepper, context_length: int, width: int) -> Step:
    tokens, positions = _inputs(model, context_length, width)
    return lambda: model.step(tokens, positions, context_length + width, keep=width).argmax(-1).tolist()


def _first_step(model: RowStepper, context_length: int, width: int) -> Step:
    tokens, positions = _inputs(model, max(0, context_length - width), width)
    return lambda: model.step(tokens, positions, max(context_length, width))[:, 0].argmax(-1)


def _chain(model: RowStepper, context_length: int) -> Step:
    tokens, positions = _inputs(model, context_length, 1)

    def steps() -> None:
        token = tokens
        for ahead in range(CHAIN):
            token = model.step(token, positions + ahead, context_length + ahead + 1).argmax(-1)

    return steps


def _look_up(draft: Draft, token_ids: list[int], asked: int, num_rows: int) -> Step:
    assert draft.max_match is not None
    assert draft.min_match is not None
    indexes = [NgramIndex(draft.max_match, draft.min_match) for _ in range(num_rows)]
    return lambda: [index.look_up(token_ids, asked) for index in indexes]


def _cycle(steps: list[tuple[str, int, Step, int]], clock: Clock) -> dict[tuple[str, int], list[float]]:
    samples: dict[tuple[str, int], list[float]] = {(part, width): [] for part, width, _, _ in steps}
    rng = random.Random(0)
    for cycle in range(WARM_UP_CYCLES + CYCLES):
        for part, width, step, count in rng.sample(steps, len(steps)):
            started = clock.read()
            step()
            elapsed = clock.read() - started
            if cycle >= WARM_UP_CYCLES:
                samples[part, width].append(elapsed / count)
    return samples
