"""Streams on the real engine: every arm decodes the same parts of a stream, part by part in a drawn order.

What drifts on the machine thus meets all arms alike. Seconds are those of the rounds; prefills are
left out.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

from profiles.engines.base import RoundController
from profiles.records.core import Prompt
from tests.benchmarks.controllers import Oracle
from tests.benchmarks.traffic import Request, Stream
from tests.benchmarks.world import LENGTHS, Family

PART_REQUESTS = 12  # of a long phase at batch 1


def parts(stream: Stream) -> Iterator[list[Request]]:
    """Requests of one phase, a dozen or four full batches at a time."""
    for _, phase in itertools.groupby(stream.requests, key=lambda request: request.phase):
        together = list(phase)
        size = max(PART_REQUESTS, 4 * together[0].concurrency)
        for first in range(0, len(together), size):
            yield together[first : first + size]


def rates(family: Family, stream: Stream, arms: Mapping[str, RoundController], seed: int) -> dict[str, float]:
    """Tokens per second of every arm over the stream."""
    order = random.Random(f"{seed} {stream.name}")
    tokens, seconds = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
    for requests in parts(stream):
        workload = replace(family.workload, batch_size=requests[0].concurrency)
        prompts: tuple[Prompt, ...] = tuple(request.prompt for request in requests)
        for name in order.sample(list(arms), len(arms)):
            run = family.bench.engine.run_adaptive(workload, prompts, arms[name], max(LENGTHS))
            tokens[name] += sum(each.tokens for each in run.rounds)
            seconds[name] += sum(each.seconds for each in run.rounds)
    return {name: tokens[name] / seconds[name] for name in arms}


def oracle(family: Family, stream: Stream) -> Oracle:
    """At batch 1: it goes on from part to part."""
    return Oracle([family.best_alone(request.prompt) for request in stream.requests])
