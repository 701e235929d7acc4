"""Which prompts are run together, in which order, and under which purpose."""

import itertools
from collections import Counter
from collections.abc import Sequence

from profiles.records.core import Prompt, Workload


def spread_over_domains(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """Picks `count` prompts, each domain in proportion to its size; all of them when there are no more."""
    sizes = Counter(prompt.domain for prompt in prompts)
    seen: Counter[str] = Counter()
    ranks = []
    for prompt in prompts:
        ranks.append((seen[prompt.domain] + 0.5) / sizes[prompt.domain])
        seen[prompt.domain] += 1
    order = sorted(range(len(prompts)), key=lambda index: ranks[index])
    return tuple(prompts[index] for index in order[:count])


def queues(
    prompts: Sequence[Prompt], batch_size: int, *, max_alone: int, num_queues: int, batches_per_queue: int
) -> tuple[tuple[Prompt, ...], ...]:
    """Groups prompts into the queues that an engine runs as one unit.

    At batch 1 every prompt is a queue of its own, `max_alone` at most. In a batch there are `num_queues` queues of
    `batches_per_queue` batches each; they cycle through the prompts, each queue starting where the last one ended.
    """
    if batch_size == 1:
        return tuple((prompt,) for prompt in spread_over_domains(prompts, max_alone))
    endless = itertools.cycle(spread_over_domains(prompts, len(prompts)))
    return tuple(tuple(itertools.islice(endless, batches_per_queue * batch_size)) for _ in range(num_queues))


def purpose_of(stage: str, workload: Workload, number: int) -> str:
    """The purpose of run `number` of a stage.

    At batch 1 it is the same for every run, so operating points share their runs of a prompt. In a batch the number is
    part of it, because a queue may be run again to see its noise.
    """
    return f"{stage} {0 if workload.batch_size == 1 else number}"
