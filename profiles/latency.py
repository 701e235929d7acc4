"""Staircases: how long one forward takes at each width, for the target and every draft, measured in turn.

All parts and widths are visited once per cycle in a shuffled order, so that drift of the machine falls on all alike.
What is timed is what a round does: make the tensor, run the forward, bring the choice to the host, roll back.
"""

import random
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from profiles.cache import CachedModel
from profiles.clock import Clock
from profiles.drafting import DraftSource, NgramDrafter
from profiles.terms import StepTimes, Workload

WARM_UP_CYCLES = 3
CYCLES = 24
DRAFT_WIDTHS = (1, 2)  # a draft step, and the catch-up step after a round that was kept whole

Step = Callable[[], object]


def time_steps(
    target: tuple[str, PreTrainedModel],
    sources: tuple[DraftSource, ...],
    workload: Workload,
    shape: tuple[int, int],
    clock: Clock,
) -> dict[str, StepTimes]:
    """Staircases by part digest; `shape` is (context tokens cached, longest speculation length).

    The target is timed at widths 1..length+1, a draft model at 1 and 2, an n-gram look-up at 1..length asked tokens.
    """
    context_length, max_length = shape
    vocabulary = int(target[1].get_input_embeddings().num_embeddings)
    token_ids = [index % 97 % vocabulary for index in range(context_length)]
    steps: list[tuple[str, int, Step]] = []
    with torch.inference_mode():
        cached = CachedModel(target[1])
        cached.step(token_ids, keep=1)
        steps += [(target[0], width, _forward(cached, width, width)) for width in range(1, max_length + 2)]
        for source in sources:
            if source.model is not None:
                cached = CachedModel(source.model)
                cached.step(token_ids, keep=1)
                steps += [(source.draft.digest, width, _forward(cached, width, 1)) for width in DRAFT_WIDTHS]
            else:
                drafter = source.new_drafter(workload, None)
                assert isinstance(drafter, NgramDrafter)
                drafter.start(tuple(token_ids))
                steps += [
                    (source.draft.digest, asked, _look_up(drafter, token_ids, asked))
                    for asked in range(1, max_length + 1)
                ]
        samples = _cycle(steps, clock)
    parts = dict.fromkeys(part for part, _, _ in steps)
    return {
        part: StepTimes(
            part_digest=part,
            batch_size=workload.batch_size,
            context_length=context_length,
            samples_s={width: tuple(values) for (owner, width), values in samples.items() if owner == part},
        )
        for part in parts
    }


def _forward(cached: CachedModel, width: int, keep: int) -> Step:
    token_ids = [0] * width

    def step() -> object:
        length = cached.length
        chosen = cached.step(token_ids, keep=keep).argmax(-1).tolist()
        cached.rollback(length)
        return chosen

    return step


def _look_up(drafter: NgramDrafter, token_ids: list[int], asked: int) -> Step:
    return lambda: drafter.propose(token_ids, asked, 0)


def _cycle(steps: list[tuple[str, int, Step]], clock: Clock) -> dict[tuple[str, int], list[float]]:
    samples: dict[tuple[str, int], list[float]] = {(part, width): [] for part, width, _ in steps}
    rng = random.Random(0)
    for cycle in range(WARM_UP_CYCLES + CYCLES):
        for part, width, step in rng.sample(steps, len(steps)):
            started = clock.read()
            step()
            elapsed = clock.read() - started
            if cycle >= WARM_UP_CYCLES:
                samples[part, width].append(elapsed)
    return samples
